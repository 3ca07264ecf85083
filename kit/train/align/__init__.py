"""Align a model with preferences (70 to 72)."""
