"""Faults of a run: noticed, told to every rank, and survived."""
