"""Tune a model on texts (60 to 62, 73)."""
