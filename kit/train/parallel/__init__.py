"""Train one classifier on several processes (63)."""
