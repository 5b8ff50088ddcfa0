"""Tensors that lie on several devices."""
