"""Run a trainer and measure it."""
