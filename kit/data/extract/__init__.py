"""Extract a document from a page (20)."""
