"""Scratch memory for loops on a CPU."""

import threading
from math import prod

import torch
from torch import Tensor


class Scratch(threading.local):
    """Named buffers for intermediate results of one turn of a loop, a few MB for each thread.

    They are kept, because memory of this size that is freed returns to the operating system, and the page faults of
    allocating it again take longer than filling it.
    """

    def __init__(self):
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized tensor of `shape`, like `like`, in the memory of the last one of this `name`."""
        size, key = prod(shape), (name, like.dtype, like.device)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a buffer made during inference is used in training, too
                buffer = self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


SCRATCH = Scratch()
