"""Elementwise modulation y = (c act(scale) + s) * x + shift, mixtures of two tensors, and their adjoints."""
