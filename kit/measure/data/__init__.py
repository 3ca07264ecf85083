"""Measure the data half beside its peers (81)."""
