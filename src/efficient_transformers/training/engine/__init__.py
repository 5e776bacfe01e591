"""The training loop, its batches, checkpoints and outputs, and what all tasks share."""
