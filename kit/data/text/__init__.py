"""Look at a text: its words, its language."""
