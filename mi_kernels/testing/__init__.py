"""Samples, the error rule and memory measurement, shared by tests and benchmarks."""
