"""Samples, the error rule, operation counts and memory measurement, shared by tests and benchmarks."""
