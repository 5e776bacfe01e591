"""The one choice between engines, and the facts about a batch that engines of a pattern share.

An engine is one way to evaluate an attention rule. All engines of a rule return the same numbers up to rounding.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .ops_tracing import is_exported, is_traced

Engine = Literal["dense", "tiled", "blocked", "flex"]


def choose_engine(device: torch.device, implementation: str | None = "sdpa", returns_weights: bool = False) -> Engine:
    """Return the engine for tensors on `device`, in the graph that is being recorded if there is one.

    - `dense` writes out the n×n weights: for `attn_implementation="eager"`, and where the weights are an output.
    - `flex` is FlexAttention's compiled kernel: for `attn_implementation="flex_attention"`, except in an exported
      graph, which may run where the kernel does not exist.
    - `tiled` is a Python loop over parts that fit into the cache, with its own backward pass: fastest on a CPU, but a
      graph would hold one copy of its body per part, and other devices would wait for its launches.
    - `blocked` is a few batched products: for graphs and for all other devices.
    """
    if returns_weights or implementation == "eager":
        return "dense"
    if implementation == "flex_attention" and not is_exported():
        return "flex"
    return "tiled" if device.type == "cpu" and not is_traced() else "blocked"


@dataclass
class BatchRows:
    """Which tokens of each row are real, and which the caller marked as global: as masks and as numbers.

    padding_mask: True at real tokens, as in transformers, (b, n); real tokens come first. None if all are real.
    lengths: real tokens per row as numbers; None if all are, and in traced code.
    global_mask: True at marked tokens, (b, n); None if there are none.
    global_tokens: their positions as numbers, row by row; None as `lengths`.
    block_masks: FlexAttention's masks, made once for all layers.
    """

    _: KW_ONLY
    padding_mask: Tensor | None = None
    lengths: Sequence[int] | None = None
    global_mask: Tensor | None = None
    global_tokens: Sequence[tuple[int, ...]] | None = None
    block_masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, padding_mask: Tensor | None, global_mask: Tensor | None = None) -> "BatchRows":
        """Create from masks (b, n), with the equivalent numbers unless a graph is recorded."""
        return BatchRows(padding_mask=padding_mask, global_mask=global_mask, **row_numbers(padding_mask, global_mask))

    def without_global_mask(self) -> "BatchRows":
        """The same rows without marked tokens."""
        return BatchRows(padding_mask=self.padding_mask, lengths=self.lengths, block_masks=self.block_masks)


def row_numbers(padding_mask: Tensor | None, global_mask: Tensor | None) -> dict[str, Any]:
    """Compute `lengths` and `global_tokens` of `BatchRows` from masks; empty while a graph is recorded."""
    numbers: dict[str, Any] = {}
    if is_traced():
        return numbers
    if padding_mask is not None:
        numbers["lengths"] = tuple(padding_mask.sum(1).tolist())
    if global_mask is not None:
        numbers["global_tokens"] = tuple(tuple(row.nonzero().flatten().tolist()) for row in global_mask)
    return numbers
