"""Softmax attention over a drawn pattern, in time and memory that follow the pattern.

Three ways to evaluate one sum, all equal to `softmax_attention` under `pattern.dense`:

* `sparse_attention`: a loop over tiles of queries against just the keys they read, with its own backward. The fast way
  on a CPU: a tile stays in the cache, and each row of the batch costs what its real tokens cost.
* `blocked_attention`: the same products as a handful of large batched ones without data-dependent control flow. For
  tracing (torch.compile, torch.export) and for devices on which launching is dear.
* `flex_sparse_attention`: FlexAttention's compiled block-sparse kernel, for CUDA.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .patterns import AttentionPattern

# Entries of a weight matrix that cost about as much as the fixed price of one tile; decides when a sequence is so
# short that one dense product is cheaper than a loop.
TILE_PRICE = 4096
# Entries of the weight matrices of a run: as many as keep the products busy and still lie in the cache, by measurement.
RUN_ENTRIES = {torch.float32: 2**16, torch.bfloat16: 2**18, torch.float16: 2**18}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    lengths: Sequence[int] | None = None,
    global_tokens: Sequence[tuple[int, ...]] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    r"""Softmax over the keys of a pattern, O(n·w·d) for a window w; `AttentionPattern` has the formula.

    `q`, `k`, `v` (b, h, n, d), best as the transposed view of (b, n, h, d) memory: then nothing is copied. `lengths`
    counts the real tokens of each row, the rest is padding on the right; None means all n. `global_tokens` adds
    positions to the pattern's own, row by row.
    Returns (b, h, n, d) in `v.dtype`, zeros at padding. Products run in the input's dtype, the softmax inside is
    float32 or wider.
    """
    batch, _, length, _ = q.shape
    rows = [length] * batch if lengths is None else list(lengths)
    patterns = [pattern] * batch if global_tokens is None else [pattern.with_global(t) for t in global_tokens]
    if len(set(zip(rows, patterns, strict=True))) == 1 and is_short(patterns[0], rows[0]):
        return dense_attention(q, k, v, patterns[0], rows[0], dropout)
    if pattern.is_full:
        # row by row at its own length rather than under a mask; split, because slices of a batch would each fill a
        # gradient of the whole batch
        by_row = zip(q.split(1), k.split(1), v.split(1), rows, strict=True)
        return torch.cat([dense_attention(x, y, z, pattern, real, dropout) for x, y, z, real in by_row])
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return TiledAttention.apply(q, k, v, patterns, rows, dropout, seed)  # type: ignore[return-value]


def is_short(pattern: AttentionPattern, length: int) -> bool:
    """Is one dense product over `length` tokens at most as dear as the tiles of the pattern?"""
    if pattern.is_full:
        return True
    per_class = -(-length // pattern.dilation)
    size = tile_size(pattern)
    window = per_class if pattern.window is None else min(per_class, size + 2 * pattern.window)
    keys = window + len(pattern.global_tokens) + pattern.num_random_blocks * pattern.random_block_size
    num_tiles = min(pattern.dilation, length) * -(-per_class // size)
    return length * length <= length * keys + num_tiles * TILE_PRICE


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, length: int, dropout: float = 0.0
) -> Tensor:
    """The whole batch in one call of torch's kernel; all rows have `length` real tokens. (b, h, n, d) like `q`."""
    padding = q.shape[2] - length
    if padding:
        q, k, v = (x[:, :, :length] for x in (q, k, v))
    if pattern.is_full:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=pattern.causal)
    else:
        mask = dense_mask(pattern, length, q.shape[1] if pattern.num_random_blocks else 1, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return F.pad(out, (0, 0, 0, padding)) if padding else out


@lru_cache(maxsize=32)
def dense_mask(pattern: AttentionPattern, length: int, num_heads: int, device: torch.device) -> Tensor:
    return pattern.dense(length, num_heads, device).contiguous()


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
            view[turn::turns] += rows[turn::turns]


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
        return weights @ rows

    def add(self, x: Tensor, head: int | None, weights: Tensor, left: Tensor) -> None:
        """`mix` transposed: x[keys] += weightsᵀ left, in place."""
        if head is None and isinstance(self.keys, Span):
            self.keys.of(x, None).baddbmm_(weights.transpose(1, 2), left)
        else:
            self.keys.add(x, head, weights.transpose(1, 2) @ left)


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
        columns = whole.split(widths, -1)
        for read, row, out in zip(self.reads, rows, columns, strict=True):
            read.dot(left, row, out)
        return whole, columns

    def weights(self, queries: Tensor, keys: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """softmax(q·k) over all reads together, as `dot`. `queries` are scaled already."""
        whole, columns = self.dot(queries, keys)
        for read, scores in zip(self.reads, columns, strict=True):
            for patch in read.patches:
                scores[..., patch.columns] += patch.bias
        return torch.softmax(whole, -1, out=whole), columns


def tile_size(pattern: AttentionPattern) -> int:
    """Queries per tile, by measurement: large enough for a fast product, small enough to skip most of the zeros."""
    if pattern.num_random_blocks:
        return pattern.random_block_size  # one draw per tile
    return 1024 if pattern.window == 0 else 64


def tiles(
    pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tile]:
    """The tiles that make up a pattern over `length` tokens; rows of global tokens last, in a tile of their own."""
    tokens = tuple(token for token in pattern.global_tokens if token < length)
    for run in windows(pattern, length, num_heads, dtype):
        alike = not (tokens and is_near(pattern, run[0], tokens))
        if alike and pattern.num_random_blocks:
            alike = not random_read(pattern, run[0], length, num_heads, dtype, device).patches
        for queries, keys in [run] if alike else one_by_one(*run):
            if pattern.window == 0:
                reads: list[Read] = [OwnRead(queries)]
            else:
                offset = (queries.start - keys.start) // queries.step
                patches = band(queries.size, keys.size, offset, pattern.window, pattern.causal, dtype, device)
                reads = [Read(keys, patches)]
            if tokens:
                reads.append(global_read(pattern, queries, tokens, dtype, device))
            if pattern.num_random_blocks:
                reads.append(random_read(pattern, queries, length, num_heads, dtype, device))
            yield Tile(queries, tuple(reads))
    if tokens:
        patches = ()
        if pattern.causal:
            allowed = torch.arange(length, device=device) <= torch.tensor(tokens, device=device)[:, None]
            patches = (Patch(slice(None), as_bias(allowed, dtype)),)
        yield Tile(as_positions(tokens, 1, device), (Read(Span(0, length), patches),), is_global=True)


def windows(pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype) -> Iterator[tuple[Span, Span]]:
    """Queries and the keys in their windows; equal tiles in runs, where one tile of all heads is a small product."""
    size, step = tile_size(pattern), pattern.dilation
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
            limit = RUN_ENTRIES.get(dtype, RUN_ENTRIES[torch.float32])
            together = 1 if num_heads * entries > limit else limit // entries
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
    if window is not None and offset + num_queries - 1 > window:
        columns = slice(0, offset + num_queries - 1 - window)
        patches.append((columns, lambda key: query - key <= window))
    if after is not None and offset + after + 1 < num_keys:
        columns = slice(offset + after + 1, num_keys)
        patches.append((columns, lambda key: key - query <= after))
    key = torch.arange(num_keys, device=device)
    return tuple(Patch(columns, as_bias(allowed(key[columns]), dtype)) for columns, allowed in patches)


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
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def as_positions(tokens: tuple[int, ...], count: int, device: torch.device) -> Span | Index:
    """Ascending positions, as a span where they have no gap: that is a view."""
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return Span(tokens[0], len(tokens), count=count)
    return Index(torch.tensor(tokens, device=device), count)


class TiledAttention(torch.autograd.Function):
    """The loop over tiles. Keeps only its inputs; backward computes the weights again, tile by tile.

    The backward is written out because autograd through the same loop keeps every weight matrix and fills a
    full-length gradient per slice: measured at three times the time.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        patterns: list[AttentionPattern],
        lengths: list[int],
        dropout: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = patterns, lengths, dropout, seed
        out, scaled, masks = torch.zeros_like(q), q * q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        for row, tile, head in tiles_of_batch(patterns, lengths, q):
            keys = [read.keys.of(k[row], head) for read in tile.reads]
            whole, weights = tile.weights(tile.queries.of(scaled[row], head), keys)
            if dropout:
                whole *= masks.like(whole)
            mixed = [r.mix(w, r.keys.of(v[row], head)) for r, w in zip(tile.reads, weights, strict=True)]
            tile.queries.put(out[row], head, sum(mixed[1:], mixed[0]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v = ctx.saved_tensors
        patterns, lengths, dropout, seed = ctx.settings
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        scaled, grad_local = q * scale, grad
        if any(pattern.global_tokens for pattern in patterns):
            grad_local = grad.clone()  # the rows of global tokens come from their own tile alone
            for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
                grad_local[row, :, [token for token in pattern.global_tokens if token < length]] = 0
        for row, tile, head in tiles_of_batch(patterns, lengths, q):
            queries = tile.queries.of(scaled[row], head)
            keys = [read.keys.of(k[row], head) for read in tile.reads]
            whole, weights = tile.weights(queries, keys)
            grad_out = tile.queries.of((grad if tile.is_global else grad_local)[row], head)
            grad_whole, grad_scores = tile.dot(grad_out, [read.keys.of(v[row], head) for read in tile.reads])
            used = weights
            if dropout:
                mask = masks.like(whole)
                grad_whole *= mask
                used = (whole * mask).split([w.shape[-1] for w in weights], -1)
            for read, weight in zip(tile.reads, used, strict=True):
                read.add(grad_v[row], head, weight, grad_out)
            softmax_backward_(grad_whole, whole)
            for read, grad_score in zip(tile.reads, grad_scores, strict=True):
                read.add(grad_k[row], head, grad_score, queries)
            mixed = [r.mix(g, key) for r, g, key in zip(tile.reads, grad_scores, keys, strict=True)]
            tile.queries.add(grad_q[row], head, sum(mixed[1:], mixed[0]))
        return grad_q.mul_(scale), grad_k, grad_v, None, None, None, None


def tiles_of_batch(
    patterns: list[AttentionPattern], lengths: list[int], q: Tensor
) -> Iterator[tuple[int, Tile, int | None]]:
    """(row, tile, head) of all products of a batch."""
    for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
        for tile in tiles(pattern, length, q.shape[1], q.dtype, q.device):
            for head in tile.heads(q.shape[1]):
                yield row, tile, head


def softmax_backward_(grad: Tensor, weights: Tensor) -> None:
    """From the gradient of softmax weights to that of the scores, in place."""
    torch._softmax_backward_data(grad, weights, -1, weights.dtype, grad_input=grad)


class DropoutMasks:
    """Dropout masks in the order of the tiles, the same ones in forward and backward."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self.kept = 1 - rate
        self.generator = torch.Generator(device).manual_seed(seed)

    def like(self, weights: Tensor) -> Tensor:
        return torch.empty_like(weights).bernoulli_(self.kept, generator=self.generator).div_(self.kept)


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`sparse_attention` as a few batched products over blocks and their neighbours, linear in n, for autograd.

    `q`, `k`, `v` (b, h, n, d); `keep` (b, n) is True at real tokens, padding on the right; `global_mask` (b, n) is True
    at further global tokens. Returns (b, h, n, d), zeros at padding. Random blocks are drawn for every row's own
    length, which is data: those heads take the dense mask here.
    """
    length = q.shape[2]
    if pattern.is_full or pattern.num_random_blocks:
        return masked_attention(q, k, v, pattern, keep, global_mask, dropout)
    step = pattern.dilation
    per_class = -(-length // step)
    window = per_class if pattern.window is None else min(pattern.window, per_class)
    size = per_class if pattern.window is None else max(window, 16)
    reach = 0 if pattern.window in (0, None) else 1  # blocks to each side
    count = -(-per_class // size)

    def fold(x: Tensor) -> Tensor:
        """(…, n, d) -> (…, residue classes, blocks, size, d), zeros behind the end."""
        x = F.pad(x, (0, 0, 0, step * count * size - length))
        return x.unflatten(-2, (count, size, step)).movedim(-2, -4)

    def with_neighbours(x: Tensor) -> Tensor:
        """(…, blocks, size, d) -> (…, blocks, keys, d)."""
        x = F.pad(x, (0, 0, 0, 0, reach, 0 if pattern.causal else reach))
        # concatenated rather than unfolded: torch.compile gave wrong gradients for overlapping windows
        return torch.cat([x[..., i : i + count, :, :] for i in range(x.shape[-3] - count + 1)], -2)

    position = torch.arange(length, device=q.device)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if keep is None else keep
    i = fold(position[:, None])  # (s, c, size, 1)
    j = with_neighbours(fold(position[:, None])).transpose(-1, -2)  # (s, c, 1, keys)
    there = with_neighbours(fold(real[..., None].to(q.dtype))).transpose(-1, -2) > 0  # (b, s, c, 1, keys)
    allowed = pattern.in_window(i, j) & there
    queries = fold(q * q.shape[-1] ** -0.5)  # (b, h, s, c, size, d)
    groups = [(queries @ with_neighbours(fold(k)).transpose(-1, -2), allowed)]

    tokens, there = global_positions(pattern, real, global_mask)  # (b, g)
    if tokens is not None:
        token_k, token_v = (x.gather(2, tokens[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
        t = tokens[:, None, None, None]  # (b, 1, 1, 1, g)
        allowed = there[:, None, None, None] & ~pattern.in_window(i, t)
        groups.append((queries @ token_k[:, :, None, None].transpose(-1, -2), allowed))

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = []
    for (score, allowed), keys in zip(groups, (j, tokens), strict=False):
        if pattern.causal:
            allowed = allowed & ((j if keys is j else t) <= i)
        scores.append(score.to(wide).masked_fill(~allowed[:, None], torch.finfo(wide).min))
    weights = F.dropout(torch.cat(scores, -1).softmax(-1).to(v.dtype), dropout)
    weights = weights.split([score.shape[-1] for score in scores], -1)
    mixed = weights[0] @ with_neighbours(fold(v))
    if tokens is not None:
        mixed = mixed + weights[1] @ token_v[:, :, None, None]
    out = mixed.movedim(-4, -2).flatten(-4, -2)[:, :, :length]

    if tokens is not None:
        rows = q.gather(2, tokens[:, None, :, None].expand(*q.shape[:2], -1, q.shape[3]))
        reads = real[:, None, None] & there[:, None, :, None]
        if pattern.causal:
            reads = reads & (position <= tokens[..., None])[:, None]
        # tokens that are not there (a row has fewer) are written behind the end and cut off
        target = torch.where(there, tokens, length)[:, None, :, None].expand_as(rows)
        full = F.scaled_dot_product_attention(rows, k, v, attn_mask=reads, dropout_p=dropout)
        out = F.pad(out, (0, 0, 0, 1)).scatter(2, target, full)[:, :, :length]
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)


def global_positions(
    pattern: AttentionPattern, real: Tensor, global_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Global tokens of each row, (b, g), and which of them are there; None if the pattern has none."""
    batch, length = real.shape if global_mask is None else global_mask.shape
    own = torch.tensor([t for t in pattern.global_tokens if t < length], dtype=torch.long, device=real.device)
    if global_mask is None:
        tokens = own.expand(batch, -1)
        return (tokens if len(own) else None), real.gather(1, tokens)
    marked = global_mask.clone()
    marked[:, own] = True
    marked &= real
    most = int(marked.sum(1).max())
    there, tokens = marked.int().topk(most, dim=1, sorted=True)
    return (tokens if most else None), there.bool()


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Torch's kernel under the dense mask of the pattern; shapes as `blocked_attention`."""
    length = q.shape[2]
    if keep is None and global_mask is None and pattern.is_full:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=pattern.causal)
    heads = q.shape[1] if pattern.num_random_blocks else 1
    if pattern.num_random_blocks and keep is not None:
        rows = [F.pad(pattern.dense(int(r), heads, q.device), (0, length - int(r)) * 2) for r in keep.sum(1)]
        allowed = torch.stack(rows)
    else:
        allowed = pattern.dense(length, heads, q.device)[None]
    if global_mask is not None:
        allowed = allowed | global_mask[:, None, :, None] | global_mask[:, None, None, :]
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed & keep[:, None, None], dropout_p=dropout)
    return out.masked_fill(~keep[:, None, :, None], 0)


@lru_cache(maxsize=1)
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    block_masks: dict | None = None,
) -> Tensor:
    """`sparse_attention` by FlexAttention; shapes as `blocked_attention`. `block_masks` keeps the masks it makes.

    On a CPU the kernel has no backward: ValueError.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    batch, num_heads, length, _ = q.shape
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "attn_implementation='flex_attention' cannot train on a CPU, where the kernel has no backward: "
            "use attn_implementation='sdpa', which is faster there."
        )
    block_masks = {} if block_masks is None else block_masks
    key = (pattern, num_heads)
    if key not in block_masks:
        drawn = torch.empty(0)
        rows = [length] * batch if keep is None else keep.sum(1).tolist()
        if pattern.num_random_blocks:
            most = -(-length // pattern.random_block_size)
            tables = [pattern.random_blocks(num_heads, -(-row // pattern.random_block_size)) for row in rows]
            drawn = torch.stack([F.pad(t, (0, 0, 0, most - t.shape[1]), value=-1) for t in tables]).to(q.device)
        base = replace(pattern, num_random_blocks=0)
        real = torch.tensor(rows, device=q.device)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            allowed = base.in_window(i, j) | base.is_global(i) | base.is_global(j)
            if global_mask is not None:
                allowed = allowed | global_mask[b, i] | global_mask[b, j]
            for draw in range(pattern.num_random_blocks):
                size = pattern.random_block_size
                allowed = allowed | (drawn[b, h, i // size, draw] == j // size)
            if pattern.causal:
                allowed = allowed & (j <= i)
            return allowed & (j < real[b]) & (i < real[b])

        alike = keep is None and global_mask is None
        block_masks[key] = create_block_mask(
            mask,
            B=1 if alike else batch,
            H=num_heads if pattern.num_random_blocks else 1,
            Q_LEN=length,
            KV_LEN=length,
            device=q.device,
        )
    out = compiled_flex_attention()(q, k, v, block_mask=block_masks[key])
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)
