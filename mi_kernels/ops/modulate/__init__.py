"""Elementwise modulation y = (act(scale) + s) * x + shift and its adjoint."""
