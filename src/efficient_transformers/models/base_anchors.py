"""Anchor tokens: the [CLS] and [SEP] of a pretrained model repeated at regular places of a long row.

A BERT-like model that was trained on short texts attends to the [CLS] and [SEP] around them in most of its heads, and
its positions end with those texts. In a long row with `anchor_interval` = 6, the tokens a … (a is the row's own [CLS])
are given to the layers as

    index        0  1  2  3  4  5      6  7  8  9  10 11     12 13
    token        a  b  c  d  e [SEP] [CLS] f  g  h  i [SEP] [CLS] …
    position     0  1  2  3  4  5      0  1  2  3  4  5      0  1

so that each interval looks like one text that the model was trained on, while the attention window extends across the
borders. Anchors are removed from all outputs. A row that fits into one interval gets no anchors and full attention: the
model then computes what the original does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base_packing import LeftPacking, pack


@dataclass(frozen=True)
class AnchorLayout:
    """Where tokens and anchors lie in rows whose intervals have `interval` places, two of them for anchors.

    Arguments are integers or int64 tensors; indices count the places of a row from 0.
    """

    interval: int

    @property
    def words(self) -> int:
        """Tokens of an interval between its anchors."""
        return self.interval - 2

    def total(self, length: Any) -> Any:
        """Number of places for `length` tokens."""
        words = length - 3  # less the row's own first and last token, and one: a full last interval needs no other
        words = words.clamp(min=0) if isinstance(words, Tensor) else torch.sym_max(words, 0)
        return length + 2 * (words // self.words)

    def places(self, length: int, device: torch.device, lengths: Tensor | None = None) -> Tensor:
        """Index of each of `length` tokens, (1, length) int64, or (b, length) if rows have `lengths` (b, 1) tokens."""
        token = torch.arange(length, device=device)[None]
        last = token == (length if lengths is None else lengths) - 1
        before = (token - 1 - last.long()).clamp(min=0)  # the last token closes the interval of the one before it
        return token + 2 * (before // self.words)

    def sources(self, places: Tensor, lengths: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For `places` in rows of `lengths` tokens: the token there or next to it, and where [SEP] and [CLS] lie.

        Beyond the end of a row the token is the row's last one.
        """
        number, offset = places // self.interval, places % self.interval
        last = (self.total(lengths) - 1) // self.interval
        cls = (offset == 0) & (number > 0) & (number <= last)
        sep = (offset == self.interval - 1) & (number < last)
        return (places - 2 * number).clamp(max=lengths - 1).clamp(min=0), sep, cls


@dataclass
class AnchoredRows:
    """Rows with their anchors. Shapes (b, n'), for n' places of a row.

    tokens: index of the token whose values a place takes over. sep, cls: True at anchors. padding_mask: False beyond
    the end of a row; None if all rows fill theirs. positions: place in the row, -1 beyond its end. position_ids:
    position in the interval. places: index of each of the n tokens, (b, n).
    """

    tokens: Tensor
    sep: Tensor
    cls: Tensor
    padding_mask: Tensor | None
    positions: Tensor
    position_ids: Tensor
    places: Tensor

    @classmethod
    def of(
        cls, layout: AnchorLayout, batch: int, length: int, padding_mask: Tensor | None, device: Any
    ) -> "AnchoredRows":
        """The rows for `batch` × `length` tokens, of which those in `padding_mask` (b, n) are real; they come first."""
        size = layout.total(length)
        index = torch.arange(size, device=device).expand(batch, -1)
        lengths = None if padding_mask is None else padding_mask.sum(1, keepdim=True)
        tokens, sep, starts = layout.sources(index, length if lengths is None else lengths)
        places = layout.places(length, device, lengths).clamp(max=size - 1).expand(batch, -1)
        real = None if lengths is None else index < layout.total(lengths)
        positions = index if real is None else index.masked_fill(~real, -1)
        return cls(tokens, sep, starts, real, positions, index % layout.interval, places)

    @classmethod
    def of_documents(cls, layout: AnchorLayout, lengths: list[int], device: Any) -> "AnchoredRows":
        """Documents of `lengths` tokens, all in one row, each with its own anchors and positions."""
        sizes = torch.tensor(lengths, device=device)
        totals = layout.total(sizes)
        number = torch.arange(len(lengths), device=device).repeat_interleave(totals)
        index = torch.arange(len(number), device=device) - (totals.cumsum(0) - totals)[number]
        tokens, sep, starts = layout.sources(index, sizes[number])
        tokens = tokens + (sizes.cumsum(0) - sizes)[number]
        places = (~sep & ~starts).nonzero()[:, 0]
        rows = tokens, sep, starts, index, index % layout.interval, places
        tokens, sep, starts, index, position_ids, places = (x[None] for x in rows)
        return cls(tokens, sep, starts, None, index, position_ids, places)

    def embed(self, embeds: Tensor, anchors: Tensor) -> Tensor:
        """Embeddings of tokens (b, n, e) and of [CLS] and [SEP] (2, e) at their places: (b, n', e)."""
        cls, sep = anchors.to(embeds.dtype)
        return torch.where(self.cls[..., None], cls, torch.where(self.sep[..., None], sep, pack(embeds, self.tokens)))

    def types(self, token_types: Tensor | None) -> Tensor | None:
        """Token types (b or 1, n); an anchor has that of a token beside it."""
        return None if token_types is None else pack(token_types.expand(self.tokens.shape[0], -1), self.tokens)

    def global_mask_of(self, global_mask: Tensor | None) -> Tensor | None:
        """Global tokens (b, n); no anchor is one."""
        return (
            None
            if global_mask is None
            else pack(global_mask, self.tokens) & ~self.cls & ~self.sep & (self.positions >= 0)
        )


@dataclass
class AnchoredPacking(LeftPacking):
    """A `LeftPacking` of rows whose tokens, (b, n), stand at `places` (b, n) among anchors."""

    places: Tensor

    def without_anchors(self, hidden: Tensor) -> Tensor:
        """(b, g + n', …) -> (b, g + n, …)."""
        return torch.cat([hidden[:, : self.num_external], pack(hidden[:, self.num_external :], self.places)], 1)

    def restore(self, hidden: Tensor) -> Tensor:
        return super().restore(self.without_anchors(hidden))

    def again(self, restored: Tensor, hidden: Tensor) -> Tensor:
        tokens = super().again(restored, hidden)[:, self.num_external :]
        index = (self.places + self.num_external)[..., None].expand_as(tokens)
        return hidden.scatter(1, index, tokens)

    def restore_weights(self, weights: Tensor) -> Tensor:
        """As in `LeftPacking`. What queries attend to at anchors is left out, so their weights sum to less than 1."""
        front = torch.arange(self.num_external, device=weights.device).expand(self.places.shape[0], -1)
        index = torch.cat([front, self.places + self.num_external], 1)[:, None]
        weights = weights.gather(2, index[..., None].expand(-1, weights.shape[1], -1, weights.shape[3]))
        weights = weights.gather(3, index[:, :, None].expand(-1, weights.shape[1], weights.shape[2], -1))
        return super().restore_weights(weights)
