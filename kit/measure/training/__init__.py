"""Measure training: settings, methods, what each costs (61, 80)."""
