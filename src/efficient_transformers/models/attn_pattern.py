"""Softmax attention over drawn patterns: the choice between the engines, and heads of several patterns together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from .attn_pattern_blocked import blocked_attention
from .attn_pattern_flex import flex_pattern_attention
from .attn_pattern_tiled import biased_attention, by_rows, is_short, kept_masks, mask_size, tiled_attention
from .ops_engine import BatchRows, choose_engine
from .ops_patterns import AttentionPattern, times_drawn
from .ops_tiles import as_bias
from .ops_tracing import count_blocks, is_traced

HeadGroups = tuple[tuple[AttentionPattern, tuple[int, ...]], ...]  # a pattern and the heads that follow it


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    rows: BatchRows,
    dropout: float = 0.0,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
    implementation: str | None = "sdpa",
) -> Tensor:
    """Softmax attention over the keys of one pattern, by the engine for the place; `AttentionPattern` has the formula.

    All engines share this signature. `q`, `k`, `v` (b, h, n, d). `random_blocks` (h, blocks, r) int64 replaces the
    pattern's draw: each entry adds that block once, even if other parts contain it; negative entries are none. Without
    `global_rows` the caller computes the rows of global tokens, and those returned here are arbitrary.
    `implementation` is the config's `attn_implementation`, other than `eager`.
    Returns (b, h, n, d) in `v.dtype`, zeros at padding.
    """
    if dropout or random_blocks is not None:  # the kernel has neither
        implementation = "sdpa"
    arguments = q, k, v, pattern, rows, dropout, random_blocks, global_rows
    match choose_engine(q.device, implementation):
        case "flex":
            return flex_pattern_attention(*arguments)
        case "tiled":
            return tiled_attention(*arguments)
        case _:
            return blocked_attention(*arguments)


def fits_one_product(groups: HeadGroups, q: Tensor, rows: BatchRows) -> bool:
    """Are the rows so short that one dense product for heads of several patterns is cheaper than one per pattern?"""
    if len(groups) < 2 or rows.global_mask is not None or choose_engine(q.device) != "tiled":
        return False
    lengths = set(rows.lengths or (q.shape[2],))
    return all(is_short(pattern, real, len(heads)) for real in lengths for pattern, heads in groups)


def one_product(q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups, rows: BatchRows, dropout: float) -> Tensor:
    """All heads of short rows, row by row where their lengths differ: one dense product instead of one per pattern."""
    attend = partial(_masked_product, groups=groups, dropout=dropout)
    return by_rows(attend, q, k, v, rows.lengths or (q.shape[2],) * len(q))


def _masked_product(q: Tensor, k: Tensor, v: Tensor, length: int, groups: HeadGroups, dropout: float) -> Tensor:
    size = mask_size(length, *(pattern for pattern, _ in groups))
    return biased_attention(q, k, v, length, bias_of_heads(groups, size, q.dtype), dropout)


def dense_mask(
    pattern: AttentionPattern,
    num_heads: int,
    positions: Tensor,
    key_positions: Tensor,
    global_mask: Tensor | None = None,
    random_blocks: Tensor | None = None,
) -> Tensor:
    """Mask of `num_heads` heads with one pattern, (b, h or 1, n, m), from positions (b, n) and (b, m), -1 at padding.

    Bool, or int64 where stored `random_blocks` (h, blocks, r) may let a query attend to a key several times.
    """
    i, j = positions[:, None, :, None], key_positions[:, None, None, :]
    lengths = (j.flatten(1).amax(1) + 1).clamp(min=1)  # real tokens of each row
    head = torch.arange(num_heads if pattern.num_random_blocks else 1, device=i.device)[:, None, None]
    drawn = pattern if random_blocks is None else replace(pattern, num_random_blocks=0)
    if drawn.num_random_blocks:  # a row draws by its own length
        size, row = drawn.block_size, torch.arange(i.shape[0], device=i.device)[:, None, None, None]
        count = count_blocks(j.shape[-1] if is_traced() else int(lengths.max()), size)
        blocks = drawn.random_blocks(num_heads, count, (lengths + size - 1) // size).flatten(0, 1)
        allowed = drawn.allows(row * num_heads + head, i, j, lengths[:, None, None, None], blocks)
    else:
        allowed = drawn.allows(head, i, j, lengths[:, None, None, None])
    if global_mask is not None:
        allowed = allowed | global_mask[:, None, :, None] | global_mask[:, None, None, :]
    if random_blocks is not None:  # global tokens attend to everything once
        times = times_drawn(random_blocks.to(i.device), head, i, j, pattern.block_size)
        allowed = allowed + times * ~pattern.is_global(i, lengths[:, None, None, None])
    return allowed


def group_heads(patterns: Sequence[AttentionPattern], num_heads: int) -> HeadGroups:
    """Heads by pattern, in order of first appearance; `patterns` are tiled over the heads."""
    groups: dict[AttentionPattern, tuple[int, ...]] = {}
    for head in range(num_heads):
        pattern = patterns[head % len(patterns)]
        groups[pattern] = (*groups.get(pattern, ()), head)
    return tuple(groups.items())


def in_order(groups: HeadGroups, parts: list[Tensor]) -> Tensor:
    """Tensors of the groups, (b, heads of the group, …), as one in the order of the heads."""
    if len(parts) == 1:
        return parts[0]
    order = [head for _, heads in groups for head in heads]
    joined = torch.cat(parts, 1)
    if order == sorted(order):
        return joined
    return joined.index_select(1, torch.tensor(order, device=joined.device).argsort())


def make_bias_of_heads(groups: HeadGroups, length: int, dtype: torch.dtype) -> Tensor:
    """0 where a head attends to a key and -inf elsewhere, (1, h, n, n); n is short here."""
    return as_bias(in_order(groups, [pattern.dense(length, len(heads))[None] for pattern, heads in groups]), dtype)


small_biases, large_biases = (lru_cache(maxsize=size)(make_bias_of_heads) for size in (16, 2))


def bias_of_heads(groups: HeadGroups, length: int, dtype: torch.dtype) -> Tensor:
    """`make_bias_of_heads`, kept (`kept_masks`)."""
    entries = sum(len(heads) for _, heads in groups) * length**2
    return kept_masks(entries, small_biases, large_biases)(groups, length, dtype)


def as_slice(heads: tuple[int, ...]) -> slice | list[int]:
    """Neighbouring heads as a slice, which is a view."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] == len(heads) - 1 else list(heads)
