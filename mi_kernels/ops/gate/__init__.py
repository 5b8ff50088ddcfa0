"""Gated forms: y = (act(p) + s) * x + shift, p and the shift computed from x and z in the same pass."""
