"""Maintain the kit: committed outputs, reference rates, the extractor's model. No notebook needs it."""
