"""A pattern cut into tiles: groups of queries, the keys they read, and the small products between them.

Nothing here knows about autograd; all positions are numbers, so a tile is a view wherever it can be.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .patterns import AttentionPattern

# Entries of the weight matrices of a run of tiles, by measurement: enough to keep the products busy, few enough to stay
# in the cache.
RUN_ENTRIES = 2**19


class Span(NamedTuple):
    """`size` positions from `start`, `step` apart. In a run of `count` tiles, tile t has them moved by t · `hop`.

    All three methods take `x` (h, n, d) and a head: None works on all heads of a single tile, (h, size, d); a number
    on all tiles of a run in that head, (count, size, d).
    """

    start: int
    size: int
    step: int = 1
    count: int = 1
    hop: int = 0

    @property
    def stop(self) -> int:
        """One past the last position of the last tile."""
        return self.start + (self.size - 1) * self.step + (self.count - 1) * self.hop + 1

    def of(self, x: Tensor, head: int | None) -> Tensor:
        """The rows at these positions, as a view."""
        if head is None:
            return x[:, self.start : self.stop : self.step]
        x = x[head]
        row, column = x.stride()
        shape, strides = (self.count, self.size, x.shape[1]), (self.hop * row, self.step * row, column)
        return x.as_strided(shape, strides, x.storage_offset() + self.start * row)

    def put(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        self.of(x, head).copy_(rows)

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        """Add `rows` in place; tiles of a run that share positions take turns."""
        view, turns = self.of(x, head), 1
        if self.count > 1 and self.hop % self.step == 0:
            turns = min(self.count, -(-self.size * self.step // self.hop)) if self.hop else self.count
        for turn in range(turns):
            view[turn::turns].add_(rows[turn::turns])


class Index(NamedTuple):
    """Positions without order: (m,) for all heads and tiles, (h, m) for each head, (h, count, m) for each tile too."""

    positions: Tensor
    count: int = 1

    def of(self, x: Tensor, head: int | None) -> Tensor:
        if head is None:
            return x.gather(1, self.spread(x))
        return x[head][self.positions if self.positions.dim() == 1 else self.positions[head]].expand(self.count, -1, -1)

    def put(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        assert head is None  # only the rows of global tokens are written by index
        x.scatter_(1, self.spread(x), rows)

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        if head is None:
            x.scatter_add_(1, self.spread(x), rows)
        else:
            positions = self.positions if self.positions.dim() == 1 else self.positions[head]
            x[head].index_add_(0, positions.expand(self.count, -1).flatten(), rows.flatten(0, 1))

    def spread(self, x: Tensor) -> Tensor:
        return self.positions.expand(x.shape[0], -1)[..., None].expand(-1, -1, x.shape[-1])


class Patch(NamedTuple):
    """A bias, 0 or -inf, on some columns of a read; broadcastable to (…, queries, columns)."""

    columns: slice
    bias: Tensor


@dataclass(frozen=True)
class Read:
    """Keys that a tile of queries reads, and what of them it must not."""

    keys: Span | Index
    patches: tuple[Patch, ...] = ()

    def width(self, rows: Tensor) -> int:
        """Columns in the weight matrix."""
        return rows.shape[1]

    def dot(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        """Inner products of each query's `left` (…, queries, d) with the read rows (…, m, d)."""
        torch.bmm(left, rows.transpose(1, 2), out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Σ over the keys of weight × row: (…, queries, d)."""
        return torch.bmm(weights, rows)

    def add(self, x: Tensor, head: int | None, weights: Tensor, left: Tensor) -> None:
        """`mix` transposed: x[keys] += weightsᵀ left, in place."""
        if head is None and isinstance(self.keys, Span):
            self.keys.of(x, None).baddbmm_(weights.transpose(1, 2), left)
        else:
            self.keys.add(x, head, torch.bmm(weights.transpose(1, 2), left))


@dataclass(frozen=True)
class OwnRead(Read):
    """Each query reads the key at its own position: one column, elementwise instead of a product."""

    def width(self, rows: Tensor) -> int:
        return 1

    def dot(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.sum(left * rows, -1, keepdim=True, out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        return weights * rows

    def add(self, x: Tensor, head: int | None, weights: Tensor, left: Tensor) -> None:
        self.keys.add(x, head, weights * left)


@dataclass(frozen=True)
class Tile:
    """Queries and what they read, or a run of such tiles that are alike; no key stands in two reads."""

    queries: Span | Index
    reads: tuple[Read, ...]
    is_global: bool = False

    def heads(self, num_heads: int) -> Iterable[int | None]:
        """A single tile does all heads in one product, a run all its tiles, head by head."""
        return range(num_heads) if self.queries.count > 1 else (None,)

    def dot(self, left: Tensor, rows: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Products of the queries' `left` with the rows of all reads: one matrix, and its columns by read."""
        widths = [read.width(row) for read, row in zip(self.reads, rows, strict=True)]
        whole = left.new_empty(*left.shape[:2], sum(widths))
        columns = whole.split(widths, -1) if len(widths) > 1 else (whole,)
        for read, row, out in zip(self.reads, rows, columns, strict=True):
            read.dot(left, row, out)
        return whole, columns

    def weights(self, queries: Tensor, keys: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """softmax(q·k) over all reads together, as `dot`. `queries` are scaled already."""
        whole, columns = self.dot(queries, keys)
        for read, scores in zip(self.reads, columns, strict=True):
            for patch in read.patches:
                scores[..., patch.columns].add_(patch.bias)  # `+=` would write the columns a second time
        return torch.softmax(whole, -1, out=whole), columns


def load(positions: Span | Index, x: Tensor, head: int | None) -> Tensor:
    """The rows at `positions`, to be read. Half precision is copied: its products are faster on whole rows."""
    rows = positions.of(x, head)
    return rows.contiguous() if x.dtype in (torch.bfloat16, torch.float16) else rows


def tile_size(pattern: AttentionPattern, dtype: torch.dtype) -> int:
    """Queries per tile, by measurement: large enough for a fast product, small enough to skip most of the zeros."""
    if pattern.num_random_blocks:
        return pattern.random_block_size  # one draw per tile
    if pattern.window == 0:
        return 1024
    return 128 if dtype in (torch.bfloat16, torch.float16) else 64  # half precision multiplies faster than it starts


def tiles(
    pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tile]:
    """The tiles that make up a pattern over `length` tokens; rows of global tokens last, in a tile of their own."""
    tokens = tuple(token for token in pattern.global_tokens if token < length)
    for run in windows(pattern, length, num_heads, dtype):
        alike, drawn = not (tokens and is_near(pattern, run[0], tokens)), None
        if pattern.num_random_blocks:
            drawn = random_read(pattern, run[0], length, num_heads, dtype, device)
            alike = alike and not drawn.patches
        for queries, keys in [run] if alike else one_by_one(*run):
            if pattern.window == 0:
                reads: list[Read] = [OwnRead(queries)]
            else:
                offset = (queries.start - keys.start) // queries.step
                patches = band(queries.size, keys.size, offset, pattern.window, pattern.causal, dtype, device)
                reads = [Read(keys, patches)]
            if tokens:
                reads.append(global_read(pattern, queries, tokens, dtype, device))
            if drawn is not None:
                whole = queries == run[0]
                reads.append(drawn if whole else random_read(pattern, queries, length, num_heads, dtype, device))
            yield Tile(queries, tuple(reads))
    if tokens:
        patches = ()
        if pattern.causal:
            allowed = torch.arange(length, device=device) <= torch.tensor(tokens, device=device)[:, None]
            patches = (Patch(slice(None), as_bias(allowed, dtype)),)
        yield Tile(as_positions(tokens, 1, device), (Read(Span(0, length), patches),), is_global=True)


def windows(pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype) -> Iterator[tuple[Span, Span]]:
    """Queries and the keys in their windows; equal tiles in runs, where one tile of all heads is a small product."""
    size, step = tile_size(pattern, dtype), pattern.dilation
    longer = length % step
    # residue classes modulo the dilation: those with one token more, then the others; without one, the sequence
    for residue, classes in ((0, longer), (longer, step - longer)):
        count = -(-(length - residue) // step) if classes else 0  # tokens of each class
        pairs = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            first = 0 if pattern.window is None else max(0, start - pattern.window)
            last = count if pattern.window is None else min(count, stop + pattern.window)
            last = stop if pattern.causal else last
            spans = ((start, stop - start), (first, last - first))
            pairs.append([Span(residue + begin * step, width, step, classes, 1) for begin, width in spans])
        if step == 1:  # neighbouring tiles of the same shape
            shapes = groupby(pairs, key=lambda pair: (pair[0].size, pair[1].size, pair[0].start - pair[1].start))
            groups = [list(group) for _, group in shapes]
            pairs = [[span._replace(count=len(group), hop=size) for span in group[0]] for group in groups]
        for queries, keys in pairs:
            entries = queries.size * (1 if pattern.window == 0 else keys.size)
            together = 1 if num_heads * entries > RUN_ENTRIES else RUN_ENTRIES // entries
            for tile in range(0, queries.count, together):
                part = min(together, queries.count - tile)
                yield part_of(queries, tile, part), part_of(keys, tile, part)


def part_of(run: Span, tile: int, count: int) -> Span:
    """`count` tiles of a run from number `tile` on."""
    return run._replace(start=run.start + tile * run.hop, count=count)


def one_by_one(queries: Span, keys: Span) -> Iterator[tuple[Span, Span]]:
    for tile in range(queries.count):
        yield part_of(queries, tile, 1), part_of(keys, tile, 1)


@lru_cache(maxsize=256)
def band(
    num_queries: int,
    num_keys: int,
    offset: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Patch, ...]:
    """What a tile must not read: query i stands at key offset + i, and only the corners of its keys lie too far off.

    The same for all inner tiles, so it is made once.
    """
    after = 0 if causal else window
    query = torch.arange(offset, offset + num_queries, device=device)[:, None]
    patches = []
    if window is not None and (width := offset + num_queries - 1 - window) > 0:
        columns = slice(0, min(num_keys, round_up(width)))
        patches.append((columns, lambda key: query - key <= window))
    if after is not None and (width := num_keys - 1 - offset - after) > 0:
        columns = slice(max(0, num_keys - round_up(width)), num_keys)
        patches.append((columns, lambda key: key - query <= after))
    key = torch.arange(num_keys, device=device)
    return tuple(Patch(columns, as_bias(allowed(key[columns]), dtype)) for columns, allowed in patches)


def round_up(width: int) -> int:
    """Columns of a patch in whole vectors: a sum over 127 columns in bfloat16 takes three times that over 128."""
    return -(-width // 32) * 32


def is_near(pattern: AttentionPattern, queries: Span, tokens: tuple[int, ...]) -> bool:
    """May a window of these queries hold a global token, or causality forbid them one?"""
    if pattern.window is None or (pattern.causal and tokens[-1] > queries.start):
        return True
    reach = pattern.window * pattern.dilation
    return any(queries.start - reach <= token < queries.stop + reach for token in tokens)


def global_read(
    pattern: AttentionPattern, queries: Span, tokens: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Read:
    """The columns of the global tokens, less those the window reads already."""
    patches = ()
    if is_near(pattern, queries, tokens):
        i = torch.arange(queries.start, queries.stop, queries.step, device=device)[:, None]
        j = torch.tensor(tokens, device=device)
        allowed = ~pattern.in_window(i, j)
        patches = (Patch(slice(None), as_bias(allowed & (j <= i) if pattern.causal else allowed, dtype)),)
    return Read(as_positions(tokens, queries.count, device), patches)


def random_read(
    pattern: AttentionPattern, queries: Span, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Read:
    """The blocks drawn for the blocks that `queries` are. Drawn blocks lie outside the window, so only a global token,
    the end of the sequence and a draw from too few have to be masked."""
    size = pattern.random_block_size
    drawn = pattern.random_blocks(num_heads, -(-length // size)).to(device)
    drawn = drawn[:, queries.start // size :][:, : queries.count]  # (h, count, blocks)
    keys = (drawn[..., None] * size + torch.arange(size, device=device)).flatten(2)  # (h, count, m); negative: none
    allowed = (keys >= 0) & (keys < length)
    if pattern.global_tokens:
        allowed &= ~pattern.is_global(keys)
    positions = keys.clamp(0, length - 1)
    if queries.count == 1:
        positions, allowed = positions[:, 0], allowed[:, 0, None]
    return Read(
        Index(positions, queries.count),
        () if bool(allowed.all()) else (Patch(slice(None), as_bias(allowed, dtype)),),
    )


def as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed and -inf elsewhere."""
    with torch.inference_mode(False):  # biases are kept: one made during inference must serve training, too
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def as_positions(tokens: tuple[int, ...], count: int, device: torch.device) -> Span | Index:
    """Ascending positions, as a span where they have no gap: that is a view."""
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return Span(tokens[0], len(tokens), count=count)
    return Index(torch.tensor(tokens, device=device), count)
