"""Training: set-up, step, loop, callbacks."""
