"""Merge and export what was trained (74)."""
