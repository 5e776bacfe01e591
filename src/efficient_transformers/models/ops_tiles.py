"""A pattern cut into tiles: groups of queries, the keys they read, and the small products between them.

Nothing here knows about autograd; all positions are numbers, so a tile is a view wherever it can be.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .ops_patterns import AttentionPattern

# Entries of the weight matrices of a run of tiles, by measurement: enough to keep the products busy, few enough to stay
# in the cache.
RUN_ENTRIES = 2**19
# Stretches of global tokens beyond which one gather is cheaper than a product for each.
MANY_SPANS = 4
Spans = tuple[tuple[int, int], ...]  # (start, stop), ascending


class Scratch(threading.local):
    """Memory for what lives as long as a turn of the loop, by name, a few MB for each thread.

    It is kept, because tensors of this size that are made anew are given back to the system and faulted in again,
    which takes longer than to fill them.
    """

    def __init__(self):
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of `shape`, in the dtype and on the device of `like`; ends the last one's life."""
        size, key = prod(shape), (name, like.dtype, like.device)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # made during inference it must serve training, too
                buffer = self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(shape)


SCRATCH = Scratch()


class Span(NamedTuple):
    """`size` positions from `start`, `step` apart. In a run of `count` tiles, tile t has them moved by t · `hop`.

    `of`, `put` and `add` take `x` (h, n, d) and a head: None works on all heads of a single tile, (h, size, d); a
    number on all tiles of a run in that head, (count, size, d).
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

    @property
    def width(self) -> int:
        """Positions of one tile in one head."""
        return self.size

    def numbers(self, device: torch.device) -> Tensor:
        """The positions of the first tile, (size,)."""
        return torch.arange(self.start, self.start + self.size * self.step, self.step, device=device)

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
        if self.count > 1 and not self.hop:  # all tiles share them
            view[0].add_(rows.sum(0))
            return
        if self.count > 1 and self.hop % self.step == 0:
            turns = min(self.count, -(-self.size * self.step // self.hop))
        for turn in range(turns):
            view[turn::turns].add_(rows[turn::turns])


class Index(NamedTuple):
    """Positions without order: (m,) for all heads and tiles, (h, m) for each head, (h, count, m) for each tile too."""

    positions: Tensor
    count: int = 1

    @property
    def width(self) -> int:
        return self.positions.shape[-1]

    def numbers(self, device: torch.device) -> Tensor:
        return self.positions.to(device)

    def of(self, x: Tensor, head: int | None, name: str = "") -> Tensor:
        if head is None:
            return x.gather(1, self.spread(x))
        positions = self.positions if self.positions.dim() == 1 else self.positions[head]
        out = SCRATCH.take(f"gathered {name}", (positions.numel(), x.shape[-1]), x)
        rows = torch.index_select(x[head], 0, positions.flatten(), out=out)
        return rows.view(-1, positions.shape[-1], x.shape[-1]).expand(self.count, -1, -1)

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


class Joined(NamedTuple):
    """Several positions side by side, copied: one large product into whole rows is faster than several into parts."""

    parts: tuple[Span | Index, ...]
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)

    def of(self, x: Tensor, head: int | None, name: str = "") -> Tensor:
        rows = [part.of(x, head) for part in self.parts]
        return torch.cat(rows, 1, out=SCRATCH.take(name, (len(rows[0]), self.width, x.shape[-1]), x))

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        for part, some in zip(self.parts, rows.split(self.widths, 1), strict=True):
            part.add(x, head, some)


class Patch(NamedTuple):
    """A bias, 0 or -inf, on some columns of a read; broadcastable to (…, queries, columns).

    `by_head`: its first axis is the head, and for a run the second one the tile.
    """

    columns: slice
    bias: Tensor
    by_head: bool = False

    def of(self, head: int | None) -> Tensor:
        return self.bias if head is None or not self.by_head else self.bias[head]


@dataclass(frozen=True)
class Read:
    """Keys that a tile of queries reads, and what of them it must not."""

    keys: Span | Index | Joined
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
            out = SCRATCH.take("sum", (len(weights), weights.shape[2], left.shape[2]), left)
            self.keys.add(x, head, torch.bmm(weights.transpose(1, 2), left, out=out))


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

    def dot(self, left: Tensor, rows: list[Tensor], name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Products of the queries' `left` with the rows of all reads: one matrix, and its columns by read."""
        widths = [read.width(row) for read, row in zip(self.reads, rows, strict=True)]
        whole = SCRATCH.take(name, (*left.shape[:2], sum(widths)), left)
        columns = whole.split(widths, -1) if len(widths) > 1 else (whole,)
        for read, row, out in zip(self.reads, rows, columns, strict=True):
            read.dot(left, row, out)
        return whole, columns

    def weights(self, queries: Tensor, keys: list[Tensor], head: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """softmax(q·k) over all reads together, as `dot`. `queries` are scaled already."""
        whole, columns = self.dot(queries, keys, "weights")
        for read, scores in zip(self.reads, columns, strict=True):
            for patch in read.patches:
                scores[..., patch.columns].add_(patch.of(head))  # `+=` would write the columns a second time
        return torch.softmax(whole, -1, out=whole), columns


def load(positions: Span | Index | Joined, x: Tensor, head: int | None, name: str = "") -> Tensor:
    """The rows at `positions`, to be read. Half precision is copied: its products are faster on whole rows."""
    rows = positions.of(x, head) if isinstance(positions, Span) else positions.of(x, head, name)
    return rows.contiguous() if x.dtype in (torch.bfloat16, torch.float16) else rows


def tile_size(pattern: AttentionPattern, dtype: torch.dtype) -> int:
    """Queries per tile, by measurement: large enough for a fast product, small enough to skip most of the zeros."""
    if pattern.num_random_blocks or pattern.in_blocks:
        return pattern.block_size  # one draw per tile
    if pattern.is_own:
        return 1024
    return 128 if dtype in (torch.bfloat16, torch.float16) else 64  # half precision multiplies faster than it starts


def tiles(
    pattern: AttentionPattern,
    length: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Iterator[Tile]:
    """The tiles that make up a pattern over `length` tokens; rows of global tokens last, in tiles of their own.

    `random_blocks` (h, blocks, r) takes the place of the pattern's draw: each entry is one read of that block, whatever
    else reads it; negative ones are none. Without `global_rows`, global tokens read as all others do.
    """
    spans = pattern.global_spans(length)
    for run in windows(pattern, length, num_heads, dtype):
        for queries, keys in apart(pattern, *run, spans):
            own, reads = (), []
            if pattern.is_own:
                own = (OwnRead(queries),)
            else:
                offset = (queries.start - keys.start) // queries.step
                window = None if pattern.in_blocks else pattern.window
                reads.append(Read(keys, band(queries.size, keys.size, offset, window, pattern.causal, dtype, device)))
            if spans:
                reads.extend(global_reads(pattern, queries, spans, dtype, device))
            if pattern.num_random_blocks:
                reads.append(random_read(pattern, queries, length, num_heads, dtype, device, random_blocks))
            yield Tile(queries, (*own, *join(reads)))
    if spans and global_rows:
        yield from tiles_of_global(pattern, spans, length, num_heads, dtype, device)


def join(reads: list[Read]) -> list[Read]:
    """Several reads as one."""
    if len(reads) < 2:
        return reads
    patches, widths = [], [read.keys.width for read in reads]
    for start, width, read in zip(accumulate([0, *widths]), widths, reads, strict=False):
        for patch in read.patches:
            first, last, _ = patch.columns.indices(width)
            patches.append(patch._replace(columns=slice(start + first, start + last)))
    keys = Joined(tuple(read.keys for read in reads), tuple(widths))  # type: ignore[arg-type]
    return [Read(keys, tuple(patches))]


def tiles_of_global(
    pattern: AttentionPattern, spans: Spans, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tile]:
    """The rows of global tokens against the whole sequence."""
    queries_per_tile = max(16, RUN_ENTRIES // (num_heads * length))
    for queries in as_positions(spans, 1, device):
        parts = [queries]
        if isinstance(queries, Span):
            firsts = range(queries.start, queries.stop, queries_per_tile)
            parts = [Span(first, min(queries_per_tile, queries.stop - first)) for first in firsts]
        for part in parts:
            patches = ()
            if pattern.causal:
                allowed = torch.arange(length, device=device) <= part.numbers(device)[:, None]
                patches = (Patch(slice(None), as_bias(allowed, dtype)),)
            yield Tile(part, (Read(Span(0, length), patches),), is_global=True)


def windows(pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype) -> Iterator[tuple[Span, Span]]:
    """Queries and the keys in their windows; equal tiles in runs, where one tile of all heads is a small product."""
    size, step, reach = tile_size(pattern, dtype), pattern.dilation, pattern.reach
    longer = length % step
    # residue classes modulo the dilation: those with one token more, then the others; without one, the sequence
    for residue, classes in ((0, longer), (longer, step - longer)):
        count = -(-(length - residue) // step) if classes else 0  # tokens of each class
        pairs = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            first = 0 if reach is None else max(0, start - reach)
            last = count if reach is None else min(count, stop + reach)
            last = stop if pattern.causal else last
            spans = ((start, stop - start), (first, last - first))
            pairs.append([Span(residue + begin * step, width, step, classes, 1) for begin, width in spans])
        if step == 1:  # neighbouring tiles of the same shape
            shapes = groupby(pairs, key=lambda pair: (pair[0].size, pair[1].size, pair[0].start - pair[1].start))
            groups = [list(group) for _, group in shapes]
            pairs = [[span._replace(count=len(group), hop=size) for span in group[0]] for group in groups]
        for queries, keys in pairs:
            entries = queries.size * (1 if pattern.is_own else keys.size)
            tiles_per_run = 1 if num_heads * entries > RUN_ENTRIES else RUN_ENTRIES // entries
            for tile in range(0, queries.count, tiles_per_run):
                part = min(tiles_per_run, queries.count - tile)
                yield part_of(queries, tile, part), part_of(keys, tile, part)


def part_of(run: Span, tile: int, count: int) -> Span:
    """`count` tiles of a run from number `tile` on."""
    return run._replace(start=run.start + tile * run.hop, count=count)


def apart(pattern: AttentionPattern, queries: Span, keys: Span, spans: Spans) -> Iterator[tuple[Span, Span]]:
    """A run cut into the tiles near a global token, which need a mask of their own, and runs of the others."""
    near = [any(is_near(pattern, part_of(queries, t, 1), *span) for span in spans) for t in range(queries.count)]
    start = 0
    for is_near_one, tiles_alike in groupby(near):
        count = len(list(tiles_alike))
        step = 1 if is_near_one else count
        for tile in range(start, start + count, step):
            yield part_of(queries, tile, step), part_of(keys, tile, step)
        start += count


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


def is_near(pattern: AttentionPattern, queries: Span, start: int, stop: int) -> bool:
    """May a window of these queries hold one of the global tokens start … stop, or causality forbid them one?"""
    if pattern.reach is None or (pattern.causal and stop > queries.start + 1):
        return True
    reach = pattern.reach * pattern.dilation
    return queries.start - reach < stop and start < queries.stop + reach


def global_reads(
    pattern: AttentionPattern, queries: Span, spans: Spans, dtype: torch.dtype, device: torch.device
) -> Iterator[Read]:
    """The columns of the global tokens, less those the window reads already."""
    for tokens in as_positions(spans, queries.count, device):
        # scattered tokens are one list, of which any may be near
        held = ((tokens.start, tokens.stop),) if isinstance(tokens, Span) else spans
        if not any(is_near(pattern, queries, *span) for span in held):
            yield Read(tokens)
            continue
        i, j = queries.numbers(device)[:, None], tokens.numbers(device)
        allowed = ~pattern.in_window(i, j)
        allowed = allowed & (j <= i) if pattern.causal else allowed
        if bool(allowed.any()):
            yield Read(tokens, (Patch(slice(None), as_bias(allowed, dtype)),))


def random_read(
    pattern: AttentionPattern,
    queries: Span,
    length: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    table: Tensor | None,
) -> Read:
    """The blocks drawn for the blocks that `queries` are. Drawn blocks lie outside the window, so only a global token,
    the end of the sequence and a draw from too few have to be masked."""
    size = pattern.block_size
    drawn = pattern.random_blocks(num_heads, -(-length // size)).to(device) if table is None else table
    drawn = drawn[:, queries.start // size :][:, : queries.count]  # (h, count, blocks)
    keys = (drawn[..., None] * size + torch.arange(size, device=device)).flatten(2)  # (h, count, m); negative: none
    allowed = (keys >= 0) & (keys < length)
    if pattern.global_tokens and table is None:
        allowed &= ~pattern.is_global(keys, length)
    positions = keys.clamp(0, length - 1)
    bias = None if bool(allowed.all()) else as_bias(allowed[:, :, None], dtype)
    if queries.count == 1:
        positions, bias = positions[:, 0], None if bias is None else bias[:, 0]
    patches = () if bias is None else (Patch(slice(None), bias, by_head=True),)
    return Read(Index(positions, queries.count), patches)


def as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed and -inf elsewhere."""
    with torch.inference_mode(False):  # biases are kept: one made during inference must serve training, too
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def as_positions(spans: Spans, count: int, device: torch.device) -> list[Span | Index]:
    """Global tokens as spans, which are views, or where they are scattered as one list of positions."""
    if len(spans) <= MANY_SPANS:
        return [Span(start, stop - start, count=count) for start, stop in spans]
    return [Index(torch.cat([torch.arange(*span, device=device) for span in spans]), count)]
