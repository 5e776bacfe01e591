"""The examples of each step, their order, and their distribution over processes."""

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.packing import IGNORED


class EpochSampler(Sampler[int]):
    """An order of the examples that depends only on the seed and the epoch, so that a run can resume in it.

    With `lengths`, examples of similar length are grouped into `batch_size` consecutive ones.
    """

    def __init__(self, size: int, seed: int, lengths: list[int] | None = None, batch_size: int = 1):
        self.size, self.seed, self.lengths, self.batch_size, self.epoch = size, seed, lengths, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


@dataclass
class Batch:
    """Inputs of one forward pass on one process. A filler batch without `indices` keeps processes synchronised."""

    indices: list[int]
    inputs: Any

    def labels(self) -> Tensor:
        """Number of labels over which the model averages its loss, float32."""
        labels = self.inputs.get("labels")
        if not self.indices:
            count = torch.zeros(())
        elif labels is None or labels.is_floating_point():
            count = torch.tensor(len(self.indices))
        else:
            count = (labels != IGNORED).sum()
        return count.float()

    def tokens(self) -> Tensor:
        """Number of tokens without padding, float32; without a mask, all tokens count."""
        mask = self.inputs.get("attention_mask")
        read = self.inputs["input_ids"].numel() if mask is None else mask.sum()
        return torch.as_tensor(read if self.indices else 0).float()


def shares(examples: Sequence[int], processes: int, batch_size: int) -> list[list[list[int]]]:
    """Distribute the examples of a step evenly into batches of at most `batch_size`: process → its batches, in order.

    Every process gets the same number of batches; the last ones are empty if there are too few examples.
    """
    rounds = math.ceil(len(examples) / (processes * batch_size))
    parts = [part.tolist() for part in np.array_split(np.array(examples), rounds * processes)]
    return [parts[process::processes] for process in range(processes)]


@dataclass
class Steps:
    """The steps of an epoch, with `size` examples each: the same examples in the same order for any number of
    processes.

    accelerate's own sharding is not used: it fills the last batches of an epoch with repeated examples, which then
    count twice, and does not report which examples a batch contains.
    `workers` are processes that load batches ahead. They restart in every epoch, after `data.set_epoch`. Random choices
    in an example depend on the seed, the epoch and the index, and not on the state of a worker, so the number of
    workers does not change any batch.
    """

    data: Any
    collate: Any
    order: EpochSampler
    size: int
    batch_size: int
    device: torch.device
    processes: int = 1
    process: int = 0
    workers: int = 0

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.order) / self.size)

    def of_epoch(self, epoch: int, done: int = 0) -> Iterator[list[Batch]]:
        """The batches of this process for each step after the first `done` ones."""
        self.order.set_epoch(epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        examples = list(self.order)
        plan = [
            shares(examples[at : at + self.size], self.processes, self.batch_size)[self.process]
            for at in range(done * self.size, len(examples), self.size)
        ]
        batches = [indices or examples[:1] for step in plan for indices in step]
        loader = DataLoader(
            self.data,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=self.collate,
            generator=own_generator(),
            worker_init_fn=ignore_sigterm,
        )
        inputs = iter(loader)
        for step in plan:
            yield [Batch(indices, send_to_device(next(inputs), self.device)) for indices in step]


def lengths_of(data: Any) -> list[int]:
    """Number of tokens of each example."""
    return data.lengths if hasattr(data, "lengths") else [len(ids) for ids in data["input_ids"]]


def ignore_sigterm(worker: int) -> None:
    """A scheduler may send SIGTERM to all processes; the training process must save before its workers end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def own_generator() -> torch.Generator:
    """A generator for loaders, which draw from it at every start: drawing from the global one would change dropout."""
    return torch.Generator().manual_seed(0)


def make_loader(data: Any, collate: Any, batch_size: int) -> DataLoader:
    """A loader of all examples in their own order, for evaluation."""
    return DataLoader(data, batch_size, collate_fn=collate, generator=own_generator())
