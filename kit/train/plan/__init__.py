"""Plan a training run: does it fit, how long will it take."""
