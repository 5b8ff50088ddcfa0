"""The public functions: broadcasting, checks, autocast, choice of a backend, call."""
