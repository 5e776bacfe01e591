"""The table of positions of the converted model, and the anchor tokens of a model that has them."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from ..models.base_resizing import Stretch, stretch_positions
from .report import Report


def anchor_ids(tokenizer: Any, config: PreTrainedConfig) -> list[int] | None:
    """Ids of [CLS] and [SEP] (<s> and </s> in RoBERTa) from the tokenizer, else from the config; None if unknown."""
    for holder, names in ((tokenizer, ("cls_token_id", "sep_token_id")), (config, ("bos_token_id", "eos_token_id"))):
        ids = [getattr(holder, name, None) for name in names]
        if None not in ids:
            return ids  # type: ignore[return-value]
    return None


def first_positions(table: Tensor, interval: int) -> Tensor:
    """The rows of `table` (n, e) for the positions of an interval. Raises ValueError if there are too few."""
    if not 0 < interval <= len(table):
        raise ValueError(
            f"anchor_interval ({interval}) must lie between 3 and {len(table)}, the positions that the source has: an "
            "interval looks like one of its texts. Take the length that it was trained on."
        )
    return table[:interval].clone()


def fit_positions(table: Tensor, length: int, how: Stretch, interval: int | None, report: Report) -> Tensor:
    """`table` (n, e) for `length` positions, or for those of an anchor interval."""
    rows = len(table)
    if interval is not None:
        report.notes.append(f"positions: {interval} of {rows} rows, which start again in each anchor interval")
        return first_positions(table, interval)
    if length != rows:
        done = "cut" if length < rows else {"tile": "tiled", "interpolate": "interpolated"}[how]
        report.notes.append(f"positions: {rows} rows {done} to {length}")
    return stretch_positions(table, length, how)
