"""Measurements against the alternatives; `run.py` measures, `report.py` shows (see README.md)."""
