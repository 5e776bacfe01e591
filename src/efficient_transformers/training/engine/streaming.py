"""Training documents that are read on demand instead of all at once."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from ..data.packing import Windows
from ..settings import InputError
from .batches import Batch, shares


@dataclass
class Stream:
    """Windows of documents, cut and shuffled within buffers of `buffer` documents.

    `read` starts again at the first document at every call; `cut` makes windows from some documents. The order and the
    masks depend only on the seed, the epoch and the position in the stream, so that a run can resume.
    """

    read: Callable[[], Iterable[str]]
    cut: Callable[[list[str]], Windows]
    buffer: int
    seed: int

    def examples(self, epoch: int) -> Iterator[tuple[int, Windows, int]]:
        """Yield the number of each example in the stream and its location: examples that are skipped are not masked."""
        documents, first = iter(self.read()), 0
        for number in itertools.count():
            texts = list(itertools.islice(documents, self.buffer))
            if not texts:
                return
            windows: Any = self.cut(texts)
            if hasattr(windows, "set_epoch"):
                windows.set_epoch(epoch, number)
            for index in np.random.default_rng((self.seed, epoch, number)).permutation(len(windows)).tolist():
                yield first + index, windows, index
            first += len(windows)


@dataclass
class StreamedSteps:
    """The steps of an epoch, like batches.Steps; their number is known only after the last document is read.

    A resumed run reads and cuts the earlier documents again, but does not train on them.
    """

    stream: Stream
    collate: Any
    size: int
    batch_size: int
    device: torch.device
    processes: int = 1
    process: int = 0

    per_epoch = None

    def of_epoch(self, epoch: int, done: int = 0) -> Iterator[list[Batch]]:
        examples = self.stream.examples(epoch)
        for number in itertools.count():
            step = list(itertools.islice(examples, self.size))
            if not step:
                if not number:
                    raise InputError("The training data contains no examples, so there is nothing to stream.")
                return
            if number >= done:
                parts = shares(range(len(step)), self.processes, self.batch_size)[self.process]
                yield [self.batch([step[place] for place in part], step[0]) for part in parts]

    def batch(self, examples: list[tuple[int, Windows, int]], filler: tuple[int, Windows, int]) -> Batch:
        inputs = self.collate([windows[index] for _, windows, index in examples or [filler]])
        return Batch([number for number, _, _ in examples], send_to_device(inputs, self.device))
