"""Select captures from a crawl's index (10, 11)."""
