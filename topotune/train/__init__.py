"""The training loop, its checkpoints and its overhead measurement."""
