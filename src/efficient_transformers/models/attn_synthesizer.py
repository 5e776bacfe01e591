"""Softmax attention by scores that no queries and keys need be behind: a sum of terms, evaluated tile by tile on a CPU.

The n×n scores of a head are never there as a whole, unless they are parameters; forward and backward compute them
for some queries at a time, and autograd keeps only the inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attn_pattern_tiled import DropoutMasks, softmax_backward_
from .ops_tiles import SCRATCH

# Entries of the weights of a tile, by measurement: enough for full products, few enough to stay in the cache.
TILE_ENTRIES = 2**20


@dataclass(frozen=True)
class Term:
    """A part of the scores: `rule(*tensors, keys)` gives (…, q, ≥ keys) of tensors (b or 1, h or 1, …) cut to a tile.

    cuts: of each tensor, whether its axes 2 and 3 go by queries ("q") or keys ("k"); "-" is kept whole.
    """

    rule: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    cuts: tuple[str, ...]


def product(q: Tensor, k: Tensor) -> Term:
    """q·k, of `q` and `k` (b or 1, h, n, f)."""
    return Term(lambda q, k, keys: q @ k.transpose(-1, -2), (q, k.to(q.dtype)), ("q-", "k-"))


def outer(left: Tensor, right: Tensor) -> Term:
    """left[j // c]·right[j mod c] for key j, of `left` (b or 1, h, n, a) and `right` (b or 1, h, n, c)."""

    def rule(left: Tensor, right: Tensor, keys: int) -> Tensor:
        stretches = -(-keys // right.shape[-1])
        return (left[..., :stretches, None] * right[..., None, :]).flatten(-2)

    return Term(rule, (left, right), ("q-", "q-"))


def matrix(scores: Tensor, share: Tensor | None = None) -> Term:
    """Scores as they are, (b or 1, h, n, n), or `share` (1, 1, 1, 1) of them."""
    if share is None:
        return Term(lambda scores, keys: scores, (scores,), ("qk",))
    return Term(lambda scores, share, keys: scores * share, (scores, share), ("qk", "--"))


def synthetic_attention(
    terms: Sequence[Term], v: Tensor, causal: bool = False, lengths: Sequence[int] | None = None, dropout: float = 0.0
) -> Tensor:
    r"""Softmax over the sum of the terms, O(n²·d) and the memory of a tile.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\Big(\sum_t S^{(t)}_{ij}\Big)\, v_j

    `v` (b, h, n, d); `lengths` counts the real tokens of each row, the rest is padding on the right; None means all n.
    Rows of one length share their weights if these do not depend on the row. Returns (b, h, n, d) in `v.dtype`, zeros
    at padding; the softmax runs in float32 or wider.
    """
    real = [v.shape[2]] * len(v) if lengths is None else lengths
    tensors = [x for term in terms for x in term.tensors]
    groups = [([row], length) for row, length in enumerate(real)]
    if not dropout and all(len(x) == 1 for x in tensors):
        groups = [([row for row, x in enumerate(real) if x == length], length) for length in set(real)]
    seed = int(torch.randint(2**62, ())) if dropout else 0
    rules = [(term.rule, term.cuts) for term in terms]
    return SyntheticAttention.apply(rules, groups, causal, dropout, seed, v, *tensors)  # type: ignore[return-value]


EqualRows = list[tuple[list[int], int]]  # rows of the batch and how many real tokens each of them has
ScoreTile = tuple[slice, slice, int]  # heads, queries, and how many keys these read, from 0 on


class SyntheticAttention(torch.autograd.Function):
    """The loop over tiles; the rules differentiate themselves, the softmax is written out."""

    @staticmethod
    def forward(
        ctx, rules: list, groups: EqualRows, causal: bool, dropout: float, seed: int, v: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(v, *tensors)
        ctx.settings = rules, groups, causal, dropout, seed
        out, masks = torch.zeros_like(v), DropoutMasks(dropout, seed, v.device)
        for rows, length in groups:
            values = side_by_side(v, rows, length)
            for tile in score_tiles(length, v.shape[1], causal):
                heads, queries, keys = tile
                inputs = inputs_of(rules, tensors, rows[0], tile)
                weights = softmax_of(parts_of(rules, inputs, keys), tile, causal)
                if dropout:
                    weights *= masks.like(weights)
                weights, read = weights.to(v.dtype), values[heads, :keys]
                if len(rows) == 1:
                    torch.bmm(weights, read, out=out[rows[0], heads, queries])
                else:
                    mixed = torch.bmm(weights, read)
                    out[rows, heads, queries] = mixed.unflatten(-1, (len(rows), -1)).permute(2, 0, 1, 3)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        v, *tensors = ctx.saved_tensors
        rules, groups, causal, dropout, seed = ctx.settings
        needed, grad_v = ctx.needs_input_grad[6:], torch.zeros_like(v)
        # a gradient as large as the n×n scores is written where it belongs, and not added to zeros
        written = len(groups) == 1 and not causal and [cuts for _, cuts in rules] == [("qk",)] and needed[0]
        written = written and tensors[0].shape[2] == groups[0][1] and tensors[0].dtype == v.dtype
        new = torch.empty_like if written else torch.zeros_like
        grads = [new(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        masks = DropoutMasks(dropout, seed, v.device)
        for rows, length in groups:
            values, grad_out = (side_by_side(x, rows, length) for x in (v, grad))
            turned = torch.zeros_like(values).transpose(1, 2).contiguous()  # a faster product than into (h, n, d)
            for tile in score_tiles(length, v.shape[1], causal):
                heads, queries, keys = tile
                inputs = [x.detach() for x in inputs_of(rules, tensors, rows[0], tile)]
                wanted = [x.requires_grad_() for x, need in zip(inputs, needed, strict=True) if need]
                with torch.enable_grad():
                    parts = parts_of(rules, inputs, keys)
                weights = softmax_of([part.detach() for part in parts], tile, causal)
                of_tile, read = grad_out[heads, queries], values[heads, :keys]
                if written:
                    (grad_scores,) = inputs_of(rules, grads, 0, tile)
                else:
                    grad_scores = SCRATCH.take("gradient", tuple(weights.shape), read)
                torch.bmm(of_tile, read.transpose(1, 2), out=grad_scores)
                grad_scores, used = grad_scores.to(weights.dtype), weights
                if dropout:
                    mask = masks.like(weights)
                    grad_scores *= mask
                    used = weights * mask
                turned[heads, :, :keys].baddbmm_(of_tile.transpose(1, 2), used.to(v.dtype))
                if not wanted:
                    continue
                softmax_backward_(grad_scores, weights)
                if written:
                    continue
                if len(parts) == 1 and parts[0] is inputs[0]:  # scores as they are
                    found: Sequence[Tensor] = [grad_scores]
                else:
                    some = [part for part in parts if part.requires_grad]
                    found = torch.autograd.grad(some, wanted, [grad_scores.to(part.dtype) for part in some])
                places = inputs_of(rules, grads, rows[0], tile)
                for place, more in zip([x for x in places if x is not None], found, strict=True):
                    place.add_(more)
            grad_v[rows, :, :length] = turned.unflatten(1, (len(rows), -1)).permute(1, 0, 3, 2)
        return None, None, None, None, None, grad_v, *grads


def score_tiles(length: int, num_heads: int, causal: bool) -> Iterator[ScoreTile]:
    """Heads and queries such that a matrix of weights has at most TILE_ENTRIES."""
    together = max(1, TILE_ENTRIES // max(1, length**2))
    for head in range(0, num_heads, together):
        for queries in query_runs(length):
            yield slice(head, min(head + together, num_heads)), queries, queries.stop if causal else length


def query_runs(length: int) -> list[slice]:
    """Queries that stand in one tile."""
    size = max(1, min(length, TILE_ENTRIES // max(1, length)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def side_by_side(x: Tensor, rows: list[int], length: int) -> Tensor:
    """Rows of `x` (b, h, n, d) as if they were features of one, (h, length, rows·d)."""
    if len(rows) == 1:
        return x[rows[0], :, :length]
    return x[rows, :, :length].permute(1, 2, 0, 3).flatten(2)


def inputs_of(rules: list, tensors: Sequence, row: int, tile: ScoreTile) -> list:
    """The views of the tensors (b or 1, h or 1, …) that belong to a tile, (heads, …) each; None of none."""
    heads, queries, keys = tile
    index = {"q": queries, "k": slice(keys), "-": slice(None)}
    views = []
    for x, cut in zip(tensors, [cut for _, cuts in rules for cut in cuts], strict=True):
        if x is not None:
            x = x[0 if len(x) == 1 else row, slice(None) if x.shape[1] == 1 else heads, index[cut[0]], index[cut[1]]]
        views.append(x)
    return views


def parts_of(rules: list, inputs: list[Tensor], keys: int) -> list[Tensor]:
    """What each rule gives for a tile, (heads, q, keys)."""
    rest, parts = iter(inputs), []
    for rule, cuts in rules:
        part = rule(*[next(rest) for _ in cuts], keys)
        parts.append(part if part.shape[-1] == keys else part[..., :keys])
    return parts


def softmax_of(parts: list[Tensor], tile: ScoreTile, causal: bool) -> Tensor:
    """Weights (heads, q, keys) of a tile, in float32 or wider; they live until the next ones."""
    queries, first = tile[1], parts[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    scores = SCRATCH.take("weights", tuple(first.shape), first.new_empty(0, dtype=wide))
    if len(parts) == 1 and not causal and first.dtype == wide:
        return torch.softmax(first, -1, out=scores)
    scores.copy_(first)
    for part in parts[1:]:
        scores.add_(part)
    if causal:
        last = scores[..., queries.start :]
        later = torch.ones(last.shape[-2:], dtype=torch.bool, device=last.device).triu_(1)
        last.masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1, out=scores)
