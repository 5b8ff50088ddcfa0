"""Normalisation, modulation and gated residual in one pass: the adaptive-norm block of transformers."""
