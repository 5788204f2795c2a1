"""Training: samples, loss, loop and resumable state."""
