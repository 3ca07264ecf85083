"""Measure on a GPU machine with nothing else on it."""
