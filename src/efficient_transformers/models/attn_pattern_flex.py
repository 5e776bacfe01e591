"""Softmax attention over a drawn pattern by FlexAttention, torch's compiled block-sparse kernel; meant for CUDA.

The kernel is compiled for each shape. So that a run over documents of any length compiles few, sequences are filled up
to four lengths for each power of two; blocks of nothing but padding are not computed.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from .ops_engine import BatchRows
from .ops_patterns import AttentionPattern, rounded_length
from .ops_tracing import is_traced

BLOCK = 128  # tokens on a side of the blocks that the kernel computes or leaves out
MOST_SHAPES = 256  # that one process may compile, of lengths, patterns and batches; torch's own limit is 8
SMALLEST_HEAD = 16  # the kernel's products on CUDA are no narrower


@lru_cache(maxsize=1)
def compiled_flex_attention():
    # one graph or an error: beyond torch's limit of shapes the kernel would else silently write out the n×n matrix
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)


def flex_pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    rows: BatchRows,
    dropout: float = 0.0,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Tensor:
    """`pattern_attention` by the kernel, without dropout and stored random blocks; it always computes global rows.

    `rows.block_masks` keeps the kernel's masks. Raises ValueError on a CPU if gradients are needed, as the kernel has
    no backward pass there, and on CUDA for heads of fewer than 16 features.
    """
    assert not dropout, "pattern_attention chooses another engine"
    assert random_blocks is None, "pattern_attention chooses another engine"
    padding_mask, global_mask, block_masks = rows.padding_mask, rows.global_mask, rows.block_masks
    batch, num_heads, length, head_dim = q.shape
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "attn_implementation='flex_attention' cannot train on a CPU, where the kernel has no backward: "
            "use attn_implementation='sdpa', which is faster there."
        )
    if q.device.type == "cuda" and head_dim < SMALLEST_HEAD:
        raise ValueError(
            f"attn_implementation='flex_attention' needs heads of at least {SMALLEST_HEAD} features on CUDA, and these "
            f"have {head_dim}: use fewer heads, or attn_implementation='sdpa'."
        )
    padding = rounded_length(length, BLOCK) - length
    key = (pattern, num_heads)
    if key not in block_masks:
        real = torch.full((batch,), length, device=q.device) if padding_mask is None else padding_mask.sum(1)
        global_mask = None if global_mask is None else F.pad(global_mask, (0, padding))
        alike = padding_mask is None and global_mask is None
        block_masks[key] = block_mask(pattern, num_heads, length + padding, real, global_mask, 1 if alike else batch)
    q, k, v = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in (q, k, v))
    if is_traced():  # a part of what is being compiled
        out = flex.flex_attention(q, k, v, block_mask=block_masks[key])
    else:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            out = compiled_flex_attention()(q, k, v, block_mask=block_masks[key])
    out = out[:, :, :length]
    return out if padding_mask is None else out.masked_fill(~padding_mask[:, None, :, None], 0)


def block_mask(
    pattern: AttentionPattern, num_heads: int, length: int, real: Tensor, global_mask: Tensor | None, rows: int
) -> flex.BlockMask:
    """Build the kernel's mask: the blocks it computes, and a rule for the pairs in them.

    `length` is a multiple of BLOCK; `real` (b,) counts the real tokens of each row; `global_mask` (b, length) is True
    at further global tokens; `rows` is 1 if all rows are alike, else b. O((length / BLOCK)²), whereas torch's
    `create_block_mask` evaluates the pairs of all tokens to find the blocks.
    """
    size, drawn = pattern.block_size, torch.empty(0, device=real.device)
    if pattern.num_random_blocks:
        drawn = pattern.random_blocks(num_heads, -(-length // size), (real + size - 1) // size)

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = pattern.in_window(i, j) | pattern.is_global(i, real[b]) | pattern.is_global(j, real[b])
        if global_mask is not None:
            allowed = allowed | global_mask[b, i] | global_mask[b, j]
        for draw in range(pattern.num_random_blocks):
            allowed = allowed | (drawn[b, h, i // size, draw] == j // size)
        if pattern.causal:
            allowed = allowed & (j <= i)
        return allowed & (j < real[b]) & (i < real[b])

    some, whole = blocks_of(pattern, length, real[:rows], global_mask, drawn[:rows])
    return flex.BlockMask.from_kv_blocks(*ordered(some & ~whole), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=rule)


def blocks_of(
    pattern: AttentionPattern, length: int, real: Tensor, global_mask: Tensor | None, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks in which some pair is allowed, and those in which every pair is, (b, h or 1, count, count) bool.

    The first may be too many and the second too few, since a rule decides about the pairs of those in between.
    """
    block, token = (torch.arange(n, device=real.device) for n in (length // BLOCK, length))
    i, j = block[:, None], block
    apart = (i - j).abs() * BLOCK
    nearest, furthest = (apart - BLOCK + 1).clamp(min=0), apart + BLOCK - 1
    if pattern.window is None:
        surely = possibly = length
    elif pattern.in_blocks:
        surely, possibly = pattern.window * pattern.block_size, (pattern.window + 1) * pattern.block_size - 1
    else:
        surely = possibly = pattern.window * pattern.dilation
    step = pattern.dilation
    some = (furthest.clamp(max=possibly) // step * step >= nearest)[None]  # is there a multiple of the dilation?
    whole = (furthest <= surely)[None] if step == 1 else torch.zeros_like(some)

    everywhere = pattern.is_global(token[None], real[:, None]).expand(real.shape[0], -1)
    if global_mask is not None:
        everywhere = everywhere | global_mask
    everywhere = everywhere.unflatten(1, (-1, BLOCK))
    partly, wholly = everywhere.any(2)[:, None], everywhere.all(2)[:, None]  # (b, 1, count)
    some = (some | partly | partly.transpose(1, 2))[:, None]
    whole = (whole | wholly | wholly.transpose(1, 2))[:, None]
    if pattern.num_random_blocks:
        some = some | drawn_pairs(drawn, pattern.block_size, len(block))

    here = real[:, None, None, None]
    some = some & (i * BLOCK < here) & (j * BLOCK < here)
    whole = whole & ((i + 1) * BLOCK <= here) & ((j + 1) * BLOCK <= here)
    if pattern.causal:
        some, whole = some & (j <= i), whole & (j < i)
    return some, whole.expand_as(some)


def drawn_pairs(drawn: Tensor, size: int, count: int) -> Tensor:
    """From a table of blocks of `size` tokens (b, h, c, r) to pairs of the kernel's blocks, (b, h, count, count)."""
    part = torch.arange((size - 2) // BLOCK + 2, device=drawn.device)  # a block lies in so many of the kernel's at most

    def cut(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(…,) -> (…, parts) blocks of the kernel, and which of them are there."""
        found = blocks[..., None] * size // BLOCK + part
        return found, (found * BLOCK < (blocks[..., None] + 1) * size) & (blocks[..., None] >= 0) & (found < count)

    rows, rows_there = cut(torch.arange(drawn.shape[2], device=drawn.device)[:, None])  # (c, 1, parts)
    columns, columns_there = cut(drawn)  # (b, h, c, r, parts)
    there = rows_there[..., None] & columns_there[..., None, :]
    index = torch.where(there, rows[..., None] * count + columns[..., None, :], count**2)  # after the end: dropped
    pairs = torch.zeros(*drawn.shape[:2], count**2 + 1, dtype=torch.bool, device=drawn.device)
    return pairs.scatter(2, index.flatten(2), True)[..., :-1].unflatten(2, (count, count))


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(…, c, c) bool -> number of True in each row, and their columns first: int32, as the kernel expects."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
