"""Keep what stages make: parts and one manifest, whose writing is the commit."""
