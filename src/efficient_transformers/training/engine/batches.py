"""Which examples make a step, in which order, and which of them each process sees."""

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
    """An order of the examples that follows from the seed and the epoch alone, so that it can be taken up again.

    With `lengths`, every `batch_size` examples of it are of similar length.
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
    """What one process reads in one forward pass. A filler of no `indices` is read for the others' sake alone."""

    indices: list[int]
    inputs: Any

    def labels(self) -> Tensor:
        """How many labels the loss of a model is the mean of, float32."""
        labels = self.inputs.get("labels")
        if not self.indices:
            count = torch.zeros(())
        elif labels is None or labels.is_floating_point():
            count = torch.tensor(len(self.indices))
        else:
            count = (labels != IGNORED).sum()
        return count.float()

    def tokens(self) -> Tensor:
        """Tokens read, float32; where nothing is padded there need be no mask."""
        mask = self.inputs.get("attention_mask")
        read = self.inputs["input_ids"].numel() if mask is None else mask.sum()
        return torch.as_tensor(read if self.indices else 0).float()


def shares(examples: Sequence[int], processes: int, batch_size: int) -> list[list[list[int]]]:
    """Divides the examples of a step evenly into batches of at most `batch_size`: process → its batches, in turn.

    Every process has as many, the last ones none of the examples if these do not reach.
    """
    rounds = math.ceil(len(examples) / (processes * batch_size))
    parts = [part.tolist() for part in np.array_split(np.array(examples), rounds * processes)]
    return [parts[process::processes] for process in range(processes)]


@dataclass
class Steps:
    """The steps of an epoch, of `size` examples each: the same examples in the same order for any number of processes.

    accelerate's own sharding is not used: it fills up the last batches of an epoch with examples that then count twice,
    and says nothing of which examples a batch holds.
    `workers` are processes that read ahead. They begin anew in every epoch, which `data` is told of before; as what an
    example draws follows from seed, epoch and index, and from no state of a worker, their number changes no batch.
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
        """The batches of this process for each step behind the first `done`."""
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
    """Tokens of each example."""
    return data.lengths if hasattr(data, "lengths") else [len(ids) for ids in data["input_ids"]]


def ignore_sigterm(worker: int) -> None:
    """A scheduler that sends it to all processes means the one that trains, which must save before its workers end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def own_generator() -> torch.Generator:
    """A loader draws from its generator at every start; from the global one, evaluating would change the dropout."""
    return torch.Generator().manual_seed(0)


def make_loader(data: Any, collate: Any, batch_size: int) -> DataLoader:
    """Everything in its own order, for evaluations."""
    return DataLoader(data, batch_size, collate_fn=collate, generator=own_generator())
