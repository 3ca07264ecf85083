"""Find copies and lines that a site repeats (40)."""
