"""The training loop, its batches, checkpoints and outputs, and what all tasks share."""

from .libraries import import_installed

import_installed("evaluate")  # training/evaluate.py has its name
