"""The training loop, its batches, checkpoints and outputs, and code shared by all tasks."""

from .libraries import import_installed

import_installed("evaluate")  # training/evaluate.py has the same name
