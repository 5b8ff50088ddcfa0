"""Gated forms: y = (act(p) + s) * x + shift, with p and the shift made of x and z in the same pass."""
