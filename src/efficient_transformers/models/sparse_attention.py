"""Softmax attention over a drawn pattern, in time and memory that follow the pattern.

Three ways to evaluate one sum, all equal to `softmax_attention` under `pattern.dense`:

* `sparse_attention`: a loop over tiles of queries against just the keys they read, with its own backward. The fast way
  on a CPU: a tile stays in the cache, and each row of the batch costs what its real tokens cost.
* `blocked_attention`: the same products as a handful of large batched ones without data-dependent control flow. For
  tracing (torch.compile, torch.export) and for devices on which launching is dear.
* `flex_sparse_attention`: FlexAttention's compiled block-sparse kernel, for CUDA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .patterns import AttentionPattern

# Entries of a weight matrix that cost about as much as the fixed price of one tile; decides when a sequence is so
# short that one dense product is cheaper than a loop.
TILE_PRICE = 4096


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
        mixed = [
            F.pad(
                dense_attention(*(x[None, :, :real] for x in row), pattern, real, dropout)[0], (0, 0, 0, length - real)
            )
            for *row, real in zip(q.unbind(), k.unbind(), v.unbind(), rows, strict=True)
        ]
        return torch.stack(mixed)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return TiledAttention.apply(q, k, v, patterns, rows, dropout, seed)  # type: ignore[return-value]


def is_short(pattern: AttentionPattern, length: int) -> bool:
    """Is one dense product over `length` tokens at most as dear as the tiles of the pattern?"""
    if pattern.is_full:
        return True
    per_class = -(-length // pattern.dilation)
    size = tile_size(pattern, torch.float32)
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


@dataclass(frozen=True)
class Read:
    """Keys that a tile of queries reads: a slice of positions, or an index (m,) or (h, m) of them.

    `bias` is 0 where a query may read and -inf elsewhere, broadcastable to (h, queries, m); None allows all.
    """

    keys: slice | Tensor
    bias: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The read rows of `x` (h, n, d): (h, m, d), a view where they are a slice."""
        if isinstance(self.keys, slice):
            return x[:, self.keys]
        return x.gather(1, self.keys.expand(x.shape[0], -1)[..., None].expand(-1, -1, x.shape[-1]))

    def width(self, keys: Tensor) -> int:
        """Columns in the weight matrix."""
        return keys.shape[1]

    def score(self, q: Tensor, keys: Tensor, out: Tensor) -> None:
        """q·k + bias, written into `out` (h, queries, m)."""
        if self.bias is None:
            torch.bmm(q, keys.transpose(1, 2), out=out)
        else:
            torch.baddbmm(self.bias.expand_as(out), q, keys.transpose(1, 2), out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Σ over the keys of weight × row: (h, queries, d)."""
        return weights @ rows

    def dot(self, left: Tensor, rows: Tensor) -> Tensor:
        """Inner products of each query's `left` (h, queries, d) with the read rows: (h, queries, m)."""
        return left @ rows.transpose(1, 2)

    def add_to(self, x: Tensor, weights: Tensor, left: Tensor) -> None:
        """`mix` transposed: x[:, keys] += weightsᵀ left, in place."""
        if isinstance(self.keys, slice):
            x[:, self.keys].baddbmm_(weights.transpose(1, 2), left)
        else:
            product = weights.transpose(1, 2) @ left
            x.scatter_add_(1, self.keys.expand(x.shape[0], -1)[..., None].expand_as(product), product)


@dataclass(frozen=True)
class OwnRead(Read):
    """Each query reads the key at its own position: one column, elementwise instead of a product."""

    def width(self, keys: Tensor) -> int:
        return 1

    def score(self, q: Tensor, keys: Tensor, out: Tensor) -> None:
        torch.sum(q * keys, -1, keepdim=True, out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        return weights * rows

    def dot(self, left: Tensor, rows: Tensor) -> Tensor:
        return (left * rows).sum(-1, keepdim=True)

    def add_to(self, x: Tensor, weights: Tensor, left: Tensor) -> None:
        x[:, self.keys] += weights * left


@dataclass(frozen=True)
class Tile:
    """Queries (positions) and what they read; no key stands in two reads."""

    queries: slice | Tensor
    reads: tuple[Read, ...]
    is_global: bool = False

    def weights(self, q: Tensor, keys: list[Tensor]) -> tuple[Tensor, ...]:
        """softmax(q·k) over all reads together, one (h, queries, m) view per read. `q` is scaled already."""
        widths = [read.width(key) for read, key in zip(self.reads, keys, strict=True)]
        scores = q.new_empty(*q.shape[:2], sum(widths))
        for read, key, columns in zip(self.reads, keys, scores.split(widths, -1), strict=True):
            read.score(q, key, columns)
        return torch.softmax(scores, -1).split(widths, -1)


def tile_size(pattern: AttentionPattern, dtype: torch.dtype) -> int:
    """Queries per tile, by measurement: large enough for the product to be fast, small enough to skip most zeros."""
    if pattern.num_random_blocks:
        return pattern.random_block_size  # one draw per tile
    if pattern.window == 0:
        return 1024
    return 64 if dtype == torch.float32 and pattern.window is not None and pattern.window <= 64 else 128


def tiles(
    pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tile]:
    """The tiles that make up a pattern over `length` tokens; rows of global tokens last, in a tile of their own."""
    tokens = tuple(token for token in pattern.global_tokens if token < length)
    size, step = tile_size(pattern, dtype), pattern.dilation
    for residue in range(min(step, length)):
        count = -(-(length - residue) // step)  # tokens of this residue class
        for start in range(0, count, size):
            stop = min(start + size, count)
            queries = slice(residue + start * step, residue + (stop - 1) * step + 1, step)
            reads = [window_read(pattern, queries, residue, start, stop, count, dtype, device)]
            if tokens:
                reads.append(global_read(pattern, queries, tokens, dtype, device))
            if pattern.num_random_blocks:
                reads.append(random_read(pattern, queries, length, num_heads, dtype, device))
            yield Tile(queries, tuple(reads))
    if tokens:
        index = as_keys(tokens, device)
        bias = None
        if pattern.causal:
            allowed = torch.arange(length, device=device) <= torch.tensor(tokens, device=device)[:, None]
            bias = as_bias(allowed, dtype)
        yield Tile(index, (Read(slice(0, length), bias),), is_global=True)


def window_read(
    pattern: AttentionPattern,
    queries: slice,
    residue: int,
    start: int,
    stop: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Read:
    """The window of the queries start … stop-1 of a residue class with `count` tokens."""
    if pattern.window == 0:
        return OwnRead(queries)
    first = 0 if pattern.window is None else max(0, start - pattern.window)
    last = count if pattern.window is None else min(count, stop + pattern.window)
    last = stop if pattern.causal else last
    keys = slice(residue + first * pattern.dilation, residue + (last - 1) * pattern.dilation + 1, pattern.dilation)
    return Read(keys, band(stop - start, last - first, start - first, pattern.window, pattern.causal, dtype, device))


@lru_cache(maxsize=256)
def band(
    num_queries: int,
    num_keys: int,
    offset: int,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Bias of a window: query i stands at key offset + i. The same for all inner tiles, so it is made once."""
    distance = (
        torch.arange(num_keys, device=device) - torch.arange(offset, offset + num_queries, device=device)[:, None]
    )
    allowed = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() <= window
    if causal:
        allowed &= distance <= 0
    return None if bool(allowed.all()) else as_bias(allowed, dtype)


def global_read(
    pattern: AttentionPattern, queries: slice, tokens: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Read:
    """The columns of the global tokens, less those the window reads already."""
    reach = None if pattern.window is None else pattern.window * pattern.dilation
    close = reach is None or any(queries.start - reach <= token < queries.stop + reach for token in tokens)
    bias = None
    if close or (pattern.causal and tokens[-1] > queries.start):
        i = torch.arange(queries.start, queries.stop, queries.step, device=device)[:, None]
        j = torch.tensor(tokens, device=device)
        allowed = ~pattern.in_window(i, j)
        bias = as_bias(allowed & (j <= i) if pattern.causal else allowed, dtype)
    return Read(as_keys(tokens, device), bias)


def random_read(
    pattern: AttentionPattern,
    queries: slice,
    length: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Read:
    """The drawn blocks of the block that `queries` are, less what the window and the global tokens read already."""
    size = pattern.random_block_size
    drawn = pattern.random_blocks(num_heads, -(-length // size)).to(device)[:, queries.start // size]  # (h, blocks)
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = (drawn[..., None] * size + torch.arange(size, device=device)).flatten(1)  # (h, m); negative where none is drawn
    keys, j = j.clamp(0, length - 1), j[:, None]
    allowed = (j >= 0) & (j < length) & ~pattern.in_window(i, j)
    allowed &= ~pattern.is_global(j)
    if pattern.causal:
        allowed &= j <= i
    return Read(keys, as_bias(allowed, dtype))


def as_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def as_keys(tokens: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Ascending positions as a slice where they have no gap, which saves the copy."""
    if tokens[-1] - tokens[0] == len(tokens) - 1:
        return slice(tokens[0], tokens[-1] + 1, 1)
    return torch.tensor(tokens, device=device)


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
        out, scale, masks = torch.zeros_like(q), q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
            for tile in tiles(pattern, length, q.shape[1], q.dtype, q.device):
                keys = [read.of(k[row]) for read in tile.reads]
                weights = tile.weights(q[row, :, tile.queries] * scale, keys)
                if dropout:
                    weights = [w * mask for w, mask in zip(weights, masks.like(weights), strict=True)]
                mixed = [r.mix(w, r.of(v[row])) for r, w in zip(tile.reads, weights, strict=True)]
                out[row, :, tile.queries] = mixed[0] if len(mixed) == 1 else torch.stack(mixed).sum(0)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v = ctx.saved_tensors
        patterns, lengths, dropout, seed = ctx.settings
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
            grad_global = grad_local = grad[row]
            if pattern.global_tokens:  # the rows of global tokens come from their own tile alone
                grad_local = grad_local.clone()
                grad_local[:, [token for token in pattern.global_tokens if token < length]] = 0
            for tile in tiles(pattern, length, q.shape[1], q.dtype, q.device):
                grad_out = (grad_global if tile.is_global else grad_local)[:, tile.queries]
                queries = q[row, :, tile.queries] * scale
                keys = [read.of(k[row]) for read in tile.reads]
                weights = tile.weights(queries, keys)
                grad_weights = [r.dot(grad_out, r.of(v[row])) for r in tile.reads]
                used = weights
                if dropout:
                    drop = masks.like(weights)
                    used = [w * mask for w, mask in zip(weights, drop, strict=True)]
                    grad_weights = [g * mask for g, mask in zip(grad_weights, drop, strict=True)]
                grad_scores = softmax_backward(grad_weights, weights)
                grad_queries = [r.mix(g, key) for r, g, key in zip(tile.reads, grad_scores, keys, strict=True)]
                for read, weight, grad_score in zip(tile.reads, used, grad_scores, strict=True):
                    read.add_to(grad_v[row], weight, grad_out)
                    read.add_to(grad_k[row], grad_score, queries)
                grad_q[row, :, tile.queries] += sum(grad_queries[1:], grad_queries[0]) * scale
        return grad_q, grad_k, grad_v, None, None, None, None


def softmax_backward(grads: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of the scores of one softmax over several groups of columns; overwrites `grads`."""
    inner = sum((g * w).sum(-1, keepdim=True) for g, w in zip(grads, weights, strict=True))
    return [g.sub_(inner).mul_(w) for g, w in zip(grads, weights, strict=True)]


class DropoutMasks:
    """Dropout masks in the order of the tiles, the same ones in forward and backward."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self.rate = rate
        self.generator = torch.Generator(device).manual_seed(seed)

    def like(self, weights: Sequence[Tensor]) -> list[Tensor]:
        kept = 1 - self.rate
        return [torch.empty_like(w).bernoulli_(kept, generator=self.generator).div_(kept) for w in weights]


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
        drawn = [None] * batch
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
