"""Load, describe, adapt and save models."""
