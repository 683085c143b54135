"""Training: steps, loops, devices, checkpoints."""
