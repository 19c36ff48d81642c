"""State, step, optimiser, checkpoints and tracking of a training run."""
