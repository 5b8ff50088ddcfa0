"""Multiplicative RNNs: schemas, derivative rules, plans, reference."""
