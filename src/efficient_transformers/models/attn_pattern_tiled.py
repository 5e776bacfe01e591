"""Softmax attention over a drawn pattern on a CPU: time and memory follow the pattern, and a row its real tokens.

A loop over tiles of queries and only the keys they attend to, with its own backward. A tile fits into the cache.
`attn_pattern_blocked` and `attn_pattern_flex` evaluate the same sum in graphs and on CUDA.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_engine import BatchRows
from .ops_patterns import AttentionPattern, rounded_length
from .ops_tile_types import Tile, load
from .ops_tiles import as_bias, tiles, windows

# Cost of a turn of the loop besides its products, and of the loop itself, in entries of a weight matrix, measured.
# They decide which sequences are so short that one dense product is faster; none above ALWAYS_LONG is.
TURN_PRICE, START_PRICE, ALWAYS_LONG = 2**16, 3 * 2**16, 4096
SMALL_MASK = 2**20  # entries of a mask of which several are kept


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    rows: BatchRows,
    dropout: float = 0.0,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Tensor:
    """`pattern_attention` by a loop over tiles, O(n·w·d) for a window w; short sequences are one dense product.

    `q`, `k`, `v` are best transposed views of (b, n, h, d) memory: then nothing is copied. Of `rows` it takes the
    numbers, `lengths` and `global_tokens`, and not the masks. Products run in the input's dtype, the softmax in
    float32 or wider.
    """
    batch, num_heads, length, _ = q.shape
    lengths = [length] * batch if rows.lengths is None else list(rows.lengths)
    global_tokens = rows.global_tokens
    patterns = [pattern] * batch if global_tokens is None else [pattern.with_global(tokens) for tokens in global_tokens]
    kinds = set(zip(patterns, lengths, strict=True))
    if random_blocks is None and all(is_short(*kind, num_heads) for kind in kinds):
        return by_rows(partial(dense_attention, dropout=dropout), q, k, v, lengths, patterns)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return TiledAttention.apply(q, k, v, patterns, lengths, dropout, seed, random_blocks, global_rows)  # type: ignore[return-value]


def by_rows(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *of_rows: Sequence[Any]) -> Tensor:
    """`attend(q, k, v, *of_row)` of the whole batch where the rows are alike, or of one row after another.

    Each row is computed at its own length instead of with a mask. The batch is split, because each slice of it would
    have a gradient of the whole batch.
    """
    rows = list(zip(*of_rows, strict=True))
    if len(set(rows)) == 1:
        return attend(q, k, v, *rows[0])
    parts = zip(q.split(1), k.split(1), v.split(1), rows, strict=True)
    return torch.cat([attend(x, y, z, *row) for x, y, z, row in parts])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, length: int, pattern: AttentionPattern, dropout: float) -> Tensor:
    """The whole batch in one call of torch's kernel; all rows have `length` real tokens. (b, h, n, d) like `q`."""
    if pattern.is_full:
        return biased_attention(q, k, v, length, None, dropout, pattern.causal)
    heads = q.shape[1] if pattern.num_random_blocks else 1
    bias = dense_bias(pattern, mask_size(length, pattern), heads, q.dtype, q.device)
    return biased_attention(q, k, v, length, bias, dropout)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, length: int, bias: Tensor | None, dropout: float, causal: bool = False
) -> Tensor:
    """Attention over the first `length` tokens, zeros after them. `bias` (1, h or 1, m, m) may cover more tokens."""
    padding = q.shape[2] - length
    if padding:
        q, k, v = (x[:, :, :length] for x in (q, k, v))
    mask = bias if bias is None else bias[..., :length, :length]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return F.pad(out, (0, 0, 0, padding)) if padding else out


def mask_size(length: int, *patterns: AttentionPattern) -> int:
    """Tokens of the mask to take for `length` of them.

    A few more, so that rows of many lengths share a few masks; exactly `length` if a pattern depends on the length.
    """
    return length if any(pattern.depends_on_length for pattern in patterns) else rounded_length(length)


def kept_masks(entries: int, small: Callable, large: Callable) -> Callable:
    """The cache for a mask of so many entries: 16 small ones and 2 large ones are kept, for all models together.

    The bound is 16 x SMALL_MASK entries and two masks of ALWAYS_LONG tokens; rows of varied lengths would otherwise
    fill the memory.
    """
    return small if entries <= SMALL_MASK else large


def make_dense_bias(
    pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """0 at the pairs of the pattern and -inf elsewhere, (1, h, n, n); None for all pairs. Only for short n."""
    allowed = pattern.dense(length, num_heads, device)[None]  # of three axes torch's fast kernel takes no mask
    return None if bool(allowed.all()) else as_bias(allowed, dtype)


small_biases, large_biases = (lru_cache(maxsize=size)(make_dense_bias) for size in (16, 2))


def dense_bias(
    pattern: AttentionPattern, length: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """`make_dense_bias`, kept (`kept_masks`)."""
    make = kept_masks(num_heads * length**2, small_biases, large_biases)
    return make(pattern, length, num_heads, dtype, device)


@lru_cache(maxsize=1024)
def is_short(pattern: AttentionPattern, length: int, num_heads: int) -> bool:
    """Is one dense product over `length` tokens no more expensive than the tiles of the pattern?"""
    if pattern.is_full:
        return True
    if length > ALWAYS_LONG:
        return False
    others = sum(stop - start for start, stop in pattern.global_spans(length))
    others += pattern.num_random_blocks * pattern.block_size
    entries = turns = 0
    for queries, keys in windows(pattern, length, num_heads, torch.float32):
        entries += queries.count * queries.size * (others + (1 if pattern.is_own else keys.size))
        turns += queries.count if pattern.num_random_blocks else (num_heads if queries.count > 1 else 1)
    return num_heads * length**2 <= num_heads * entries + turns * TURN_PRICE + START_PRICE


class TiledAttention(torch.autograd.Function):
    """The loop over tiles. Keeps only its inputs; backward computes the weights again, tile by tile.

    The backward is written by hand, because autograd through the same loop stores every weight matrix and allocates a
    full-length gradient per slice: three times slower by measurement.
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
        random_blocks: Tensor | None = None,
        global_rows: bool = True,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = patterns, lengths, dropout, seed, random_blocks, global_rows
        out = torch.empty_like(q) if min(lengths) == q.shape[2] else torch.zeros_like(q)
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        for row, tile, head in tiles_of_batch(patterns, lengths, q, random_blocks, global_rows):
            keys = [load(read.keys, k[row], head, "rows") for read in tile.reads]
            whole, weights = tile.weights(tile.queries.of(q[row], head) * scale, keys, head)
            if dropout:
                whole *= masks.like(whole)
            values = [load(read.keys, v[row], head, "rows") for read in tile.reads]
            mixed = [read.mix(w, x) for read, w, x in zip(tile.reads, weights, values, strict=True)]
            tile.queries.put(out[row], head, sum(mixed[1:], mixed[0]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v = ctx.saved_tensors
        patterns, lengths, dropout, seed, random_blocks, global_rows = ctx.settings
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        grad_local = grad
        spans = [pattern.global_spans(length) for pattern, length in zip(patterns, lengths, strict=True)]
        if global_rows and any(spans):
            grad_local = grad.clone()  # the rows of global tokens come from their own tiles alone
            for row, start, stop in ((row, *span) for row, of_row in enumerate(spans) for span in of_row):
                grad_local[row, :, start:stop] = 0
        for row, tile, head in tiles_of_batch(patterns, lengths, q, random_blocks, global_rows):
            queries = tile.queries.of(q[row], head) * scale
            keys = [load(read.keys, k[row], head, "keys") for read in tile.reads]
            whole, weights = tile.weights(queries, keys, head)
            grad_out = load(tile.queries, (grad if tile.is_global else grad_local)[row], head)
            values = [load(read.keys, v[row], head, "values") for read in tile.reads]
            grad_whole, grad_scores = tile.dot(grad_out, values, "gradient")
            used = weights
            if dropout:
                mask = masks.like(whole)
                grad_whole *= mask
                used = (whole * mask).split([weight.shape[-1] for weight in weights], -1)
            for read, weight in zip(tile.reads, used, strict=True):
                read.add(grad_v[row], head, weight, grad_out)
            softmax_backward_(grad_whole, whole)
            for read, grad_score in zip(tile.reads, grad_scores, strict=True):
                read.add(grad_k[row], head, grad_score, queries)
            mixed = [r.mix(g, key) for r, g, key in zip(tile.reads, grad_scores, keys, strict=True)]
            tile.queries.add(grad_q[row], head, sum(mixed[1:], mixed[0]))
        return grad_q.mul_(scale), grad_k, grad_v, *[None] * 6


def tiles_of_batch(
    patterns: list[AttentionPattern], lengths: list[int], q: Tensor, random_blocks: Tensor | None, global_rows: bool
) -> Iterator[tuple[int, Tile, int | None]]:
    """(row, tile, head) of all products of a batch."""
    for row, (pattern, length) in enumerate(zip(patterns, lengths, strict=True)):
        for tile in tiles(pattern, length, q.shape[1], q.dtype, q.device, random_blocks, global_rows):
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
