"""Training of models, installed by the extra `train`. Nothing else in the package imports it.

Subpackages, each of which imports only those listed before it:

- `settings`: the settings shared by all tasks, and how they are read
- `data`: texts, documents, images, and the windows of tokens cut from them
- `synthetic`: generated data (ListOps, Pathfinder, recall)
- `engine`: the training loop, its batches, checkpoints and outputs, and the base class of a task
- `tasks`: one module per task
- `runs`: several runs, tables of results, and publishing
"""
