"""Refine documents: tags, masks, features, verdicts (30)."""
