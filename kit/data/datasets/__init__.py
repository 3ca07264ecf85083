"""Build training rows and preference pairs, augment and balance them (50 to 52)."""
