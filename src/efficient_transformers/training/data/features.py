"""Encoded examples as a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .coverage import Coverage


class Features(Dataset):
    """Windows as a dataset.

    rows: inputs of the model, a mapping for each window.
    notes: additional data of each window for the evaluation, such as the index of its document.
    shared: additional data of the whole split for the evaluation.
    coverage: how much of the documents the windows contain.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        notes: Sequence[Any] = (),
        shared: Any = None,
        coverage: Coverage | None = None,
    ):
        self.rows, self.notes, self.shared, self.coverage = rows, notes, shared, coverage

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {key: value.astype(np.int64) if isinstance(value, np.ndarray) else value for key, value in row.items()}

    @property
    def lengths(self) -> list[int]:
        """Length of each example in tokens (of its longest sequence, if it has several)."""
        first = (row["input_ids"] for row in self.rows)
        return [max(map(len, ids)) if isinstance(ids, list) else len(ids) for ids in first]
