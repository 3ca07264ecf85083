"""Encode rows: tokens, what counts in the loss, batches."""
