"""Groups of a `BucketLayout` in the order in which a CPU processes them: bundles of heads, cut into runs of groups.

    bundle: several heads, concatenated     head 0: | g0 | g1 | g2 | g3 |  head 1: | g4 | g5 | g6 |
    runs:   neighbouring groups of it                [     run 0     ] [     run 1      ] [ run 2 ]

A group has c query slots and m key slots, each holding the number of a token or nothing. If a layout has no keys of its
own, the key slots of a group are those of the previous group and its own, so that the keys of a run overlap:

    key slots of a run      | g1 | g2 | g3 | g4 |     (g + 1)·c rows, gathered once
    keys of g2              [ g1   g2 ]               m = 2c rows: a strided view
    keys of g3                   [ g2   g3 ]
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .ops_buckets import BucketLayout
from .ops_scratch import SCRATCH
from .ops_tiles import RUN_ENTRIES

# Slots of a bundle, by measurement. A training step of two layers over 32 padded rows of 64 tokens, 4 heads, 4 rounds
# of chunks of 8, takes 1,200 ms head by head, because each operation is called for a few numbers, and 160 ms in
# bundles; twice or four times as many slots are no faster.
BUNDLE_SLOTS = 2**14


class Bundle(NamedTuple):
    """Several heads of several rows, concatenated along the tokens and along the groups, as if they were one head.

    Groups without a token are left out. No token attends across the gap, because labels are contiguous.
    """

    layout: BucketLayout  # of the batch
    part: tuple[slice, slice]  # its rows, their heads
    queries: Tensor  # (g, c)
    keys: Tensor | None  # (g, m)
    labels: Tensor | None  # (g, c)

    def of(self, x: Tensor) -> Tensor:
        """(b, h, n, …) -> all tokens of the bundle, (t, …): a view for a single head, else a copy."""
        return x[self.part].flatten(0, 2)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write `rows` (t, …) to the bundle's part of `x` (b, h, n, …)."""
        here = x[self.part]
        here.copy_(rows.view(here.shape))


def bundles(layout: BucketLayout, length: int) -> Iterator[Bundle]:
    """All heads of a batch of `length` tokens, in bundles of up to BUNDLE_SLOTS slots."""
    batch, num_heads, groups, size = layout.queries.shape
    heads_per_bundle = max(1, BUNDLE_SLOTS // (groups * size))
    rows, heads = max(1, heads_per_bundle // num_heads), min(heads_per_bundle, num_heads)
    for row in range(0, batch, rows):
        for head in range(0, num_heads, heads):
            part = slice(row, row + rows), slice(head, head + heads)
            filled = (layout.queries[part] >= 0).any(-1)
            count = filled.shape[0] * filled.shape[1]
            queries = concatenated(layout.queries[part], filled, 1, length)
            keys = None if layout.keys is None else concatenated(layout.keys[part], filled, 1, length)
            labels = None if layout.labels is None else concatenated(layout.labels[part], filled, count, 1)
            yield Bundle(layout, part, queries, keys, labels)


def concatenated(x: Tensor, filled: Tensor, factor: int, step: int) -> Tensor:
    """Concatenate slots of several heads, (b, h, g, …), without the groups that are not `filled` (b, h, g).

    Numbers of different heads are made different: head i has x · `factor` + i · `step` for x. Empty slots stay -1.
    """
    batch, heads, _ = filled.shape
    if batch * heads > 1:
        number = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
        x = torch.where(x < 0, x, x * factor + number * step)
    x = x.flatten(0, 2)
    return x if bool(filled.all()) else x[filled.flatten()]


class GroupRun(NamedTuple):
    """Neighbouring groups of a bundle that are processed at once: the tokens in their slots, and the masked pairs.

    queries: tokens in the query slots, (g·c,), 0 at empty slots. slots: their place among the slots of the bundle.
    keys: tokens in the key slots, (g·m,); ((g + 1)·c,) if groups overlap.
    size: c.
    forbidden: True at masked pairs, broadcastable to (g, c, m). band: 0 or -inf, (c, m), the same for all groups.
    overlaps: does a group attend to the previous one as well? own: as in `BucketLayout`.
    """

    queries: Tensor
    keys: Tensor
    size: int
    forbidden: Tensor
    band: Tensor | None
    slots: slice
    overlaps: bool
    own: bool

    def gather(self, name: str, x: Tensor) -> Tensor:
        """Rows of `x` (t, d) in the query slots, (g, c, d), in scratch memory."""
        return take(x, self.queries, name).unflatten(0, (-1, self.size))

    def gather_keys(self, name: str, x: Tensor) -> Tensor:
        """Rows of `x` (t, d) in the key slots of each group, (g, m, d), in scratch memory."""
        return self.windows(take(x, self.keys, name))

    def per_query(self, x: Tensor) -> Tensor:
        """Entries of `x` (t,) in the query slots, (g, c, 1)."""
        return x[self.queries].view(-1, self.size, 1)

    def scatter(self, x: Tensor, rows: Tensor) -> None:
        """x[queries] += rows (g, c, d), in place."""
        x.index_add_(0, self.queries, rows.flatten(0, 1))

    def windows(self, x: Tensor) -> Tensor:
        """Rows in the order of `keys` -> (g, m, d), a view."""
        if not self.overlaps:
            return x.unflatten(0, (len(self.queries) // self.size, -1))
        groups, dim = len(self.queries) // self.size, x.shape[-1]
        return x.as_strided((groups, 2 * self.size, dim), (self.size * dim, dim, 1))

    def scatter_keys(self, x: Tensor, grad: Tensor) -> None:
        """x[keys] += grad (g, m, d), in place."""
        if self.overlaps:
            before, here = grad.split(self.size, 1)
            grad = SCRATCH.take("folded slots", (len(self.keys), x.shape[-1]), x)
            grad[self.size :] = here.flatten(0, 1)
            grad[: self.size] = 0
            grad[: -self.size] += before.flatten(0, 1)
        else:
            grad = grad.flatten(0, 1)
        x.index_add_(0, self.keys, grad)

    def mask_(self, scores: Tensor, alone: Tensor | float) -> None:
        """Mask `scores` (g, c, m) in place; unless `own`, set each slot's score with itself to `alone`, (g, c)."""
        scores.masked_fill_(self.forbidden, float("-inf"))
        if self.band is not None:
            scores.add_(self.band)
        if not self.own:
            diagonal = scores.diagonal(scores.shape[2] - self.size, 1, 2)
            diagonal.copy_(alone) if isinstance(alone, Tensor) else diagonal.fill_(alone)


def group_runs(bundle: Bundle, dtype: torch.dtype) -> Iterator[GroupRun]:
    """All groups of a bundle, in runs that fit into the cache."""
    layout, tokens = bundle.layout, bundle.queries
    size = tokens.shape[-1]
    groups_per_run = max(1, RUN_ENTRIES // (size * layout.keys_per_group))
    band = causal_band(size, dtype, tokens.device) if layout.causal and layout.keys is None else None
    for first in range(0, len(tokens), groups_per_run):
        here = tokens[first : first + groups_per_run]
        queries, part = here.flatten().clamp(min=0), slice(first * size, (first + len(here)) * size)
        if bundle.keys is not None:
            keys = bundle.keys[first : first + groups_per_run]
            forbidden = (keys < 0)[:, None]
            if layout.causal:
                forbidden = forbidden | (keys[:, None] > here[..., None])
            if not layout.own:
                forbidden = forbidden | (keys[:, None] == here[..., None])
            yield GroupRun(queries, keys.flatten().clamp(min=0), size, forbidden, band, part, False, layout.own)
            continue
        assert bundle.labels is not None
        labels = bundle.labels[first : first + groups_per_run]
        if first:
            before, before_label = tokens[first - 1], bundle.labels[first - 1]
        else:
            before, before_label = torch.zeros_like(tokens[0]), torch.full_like(tokens[0], -2)
        keys = torch.cat([before.clamp(min=0), queries])
        around = torch.cat([before_label, labels.flatten()]).as_strided((len(here), 2 * size), (size, 1))
        # an empty slot is no key, so it must not equal itself
        forbidden = around[:, None] != labels.masked_fill(labels < 0, -3)[..., None]
        yield GroupRun(queries, keys, size, forbidden, band, part, True, layout.own)


def causal_band(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(c, 2c): 0 where key slot j is one of the c slots up to query slot c + i, -inf elsewhere."""
    i, j = torch.arange(size, device=device)[:, None], torch.arange(2 * size, device=device)
    return torch.zeros(size, 2 * size, dtype=dtype, device=device).masked_fill_((j < i) | (j > size + i), float("-inf"))


def take(x: Tensor, tokens: Tensor, name: str) -> Tensor:
    """Rows of `x` (n, d), in scratch memory that the next call with this `name` overwrites."""
    return torch.index_select(x, 0, tokens, out=SCRATCH.take(f"{name} of slots", (len(tokens), x.shape[-1]), x))
