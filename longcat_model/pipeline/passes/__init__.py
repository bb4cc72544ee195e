"""Passes: pure functions from a schedule to a schedule, each one idea. `lower.py` says in which order they run."""
