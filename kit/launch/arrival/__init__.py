"""Refine a file when it lands (31)."""
