"""Cut an attention pattern into tiles: groups of queries and the keys they attend to.

keys →
g g g g g g g g g g g g g g g g g g    g  global token: a column of every tile, and a row of its own
g w w w . . . . . r r r . . . . . .    w  window: the keys within reach of a query
g w w w w . . . . r r r . . . . . .    .  not computed, or in a corner of a tile's window and masked
g w w w w w . . . r r r . . . . . .    r  random block: gathered by an `Index`
g . w w w w w . . . . . r r r . . .
g . . w w w w w . . . . r r r . . .    A tile is a few rows, here three, with the columns they need.
g . . . w w w w w . . . r r r . . .

The tiles of rows 1 and 4 have windows of different shapes, because the start of the sequence cuts off the first one.
Neighbouring tiles of equal shape form a run: their rows are strided views, and a batched product computes all of them
in one head. A single tile is computed in all heads at once.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from .ops_patterns import AttentionPattern
from .ops_tile_types import Index, Joined, OwnRead, Patch, Read, Span, Tile

# Entries of the weight matrices of a run of tiles, by measurement: enough for fast products, few enough for the cache.
RUN_ENTRIES = 2**19
# Number of stretches of global tokens beyond which one gather is faster than a product for each.
MANY_SPANS = 4
Spans = tuple[tuple[int, int], ...]  # (start, stop), ascending


def tile_size(pattern: AttentionPattern, dtype: torch.dtype) -> int:
    """Queries per tile, by measurement: large enough for fast products, small enough to skip most masked pairs."""
    if pattern.num_random_blocks or pattern.in_blocks:
        return pattern.block_size  # one draw per tile
    if pattern.is_own:
        return 1024
    return 128 if dtype in (torch.bfloat16, torch.float16) else 64  # half-precision products start slowly


def tiles(
    pattern: AttentionPattern,
    length: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Iterator[Tile]:
    """The tiles of a pattern over `length` tokens; the rows of global tokens come last, in tiles of their own.

    `random_blocks` (h, blocks, r) replaces the pattern's draw: each entry adds that block once, even if other reads
    contain it; negative entries are none. Without `global_rows`, global tokens have ordinary rows only.
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
    """Combine several reads into one."""
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
    """The rows of global tokens, which attend to the whole sequence."""
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
    """Queries and the keys in their windows. Small tiles of equal shape form runs, for larger products."""
    size, step, reach = tile_size(pattern, dtype), pattern.dilation, pattern.reach
    longer = length % step
    # residue classes modulo the dilation: first those with one token more; without dilation, the whole sequence
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
    """Cut a run into single tiles near a global token, which need masks of their own, and runs of the others."""
    near = [any(is_near(pattern, part_of(queries, t, 1), *span) for span in spans) for t in range(queries.count)]
    start = 0
    for is_near_one, tiles_alike in groupby(near):
        count = len(list(tiles_alike))
        step = 1 if is_near_one else count
        for tile in range(start, start + count, step):
            yield part_of(queries, tile, step), part_of(keys, tile, step)
        start += count


@lru_cache(maxsize=64)  # of a tile at most each, 2**16 entries or a few: 16 MB
def band(
    num_queries: int,
    num_keys: int,
    offset: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Patch, ...]:
    """Masks of a window: query i is at key offset + i, and only the corners of the tile are out of reach.

    All inner tiles share them, so they are cached.
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
    """Columns of a patch in whole vectors: bfloat16 sums over 127 columns take three times as long as over 128."""
    return -(-width // 32) * 32


def is_near(pattern: AttentionPattern, queries: Span, start: int, stop: int) -> bool:
    """May a window of these queries contain a global token of start … stop, or may causality mask one?"""
    if pattern.reach is None or (pattern.causal and stop > queries.start + 1):
        return True
    reach = pattern.reach * pattern.dilation
    return queries.start - reach < stop and start < queries.stop + reach


def global_reads(
    pattern: AttentionPattern, queries: Span, spans: Spans, dtype: torch.dtype, device: torch.device
) -> Iterator[Read]:
    """The global tokens as keys, except those in the window."""
    for tokens in as_positions(spans, queries.count, device):
        # scattered tokens are one list, any of which may be near
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
    """The random blocks of `queries`, which are whole blocks themselves.

    Drawn blocks are outside the window, so only global tokens, the end of the sequence and missing draws are masked.
    """
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
    with torch.inference_mode(False):  # biases are cached: one made during inference is used in training, too
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def as_positions(spans: Spans, count: int, device: torch.device) -> list[Span | Index]:
    """Global tokens as spans, which are views, or, if they are scattered, as one list of positions."""
    if len(spans) <= MANY_SPANS:
        return [Span(start, stop - start, count=count) for start, stop in spans]
    return [Index(torch.cat([torch.arange(*span, device=device) for span in spans]), count)]
