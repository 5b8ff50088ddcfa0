"""Measurements against the alternatives; `run.py` measures, `harness/report.py` shows (see README.md)."""
