"""Softmax attention over scores that are a sum of terms, tile by tile on a CPU.

The n×n scores of a head never exist as a whole, unless they are a parameter. Forward and backward compute them for a
few queries at a time, and autograd keeps only the inputs.

    one head:       keys →                       a tile holds some queries of one head and all their keys (of a
                 ┌───────────────┐               decoder, those up to its last query), or, of short sequences, all
      queries    │    tile 0     │               queries of several heads. A term cuts its tensors accordingly: "q"
         ↓       ├───────────────┤               axes to the queries, "k" axes to the keys.
                 │    tile 1     │
                 └───────────────┘
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .attn_pattern_tiled import DropoutMasks, softmax_backward_
from .ops_score_terms import Term
from .ops_scratch import SCRATCH

# Entries of the weights of a tile, by measurement: enough for full products, few enough to stay in the cache.
TILE_ENTRIES = 2**20


def synthetic_attention(
    terms: Sequence[Term], v: Tensor, causal: bool = False, lengths: Sequence[int] | None = None, dropout: float = 0.0
) -> Tensor:
    r"""Softmax over the sum of the terms, O(n²·d) and the memory of a tile.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\Big(\sum_t S^{(t)}_{ij}\Big)\, v_j

    `v` (b, h, n, d); `lengths` counts the real tokens of each row, the rest is padding on the right; None means all n.
    Rows of one length share their weights if no term depends on the row. Returns (b, h, n, d) in `v.dtype`, zeros at
    padding; the softmax runs in float32 or wider.
    """
    real = [v.shape[2]] * len(v) if lengths is None else lengths
    tensors = [x for term in terms for x in term.tensors]
    groups = [([row], length) for row, length in enumerate(real)]
    if not dropout and all(len(x) == 1 for x in tensors):
        groups = [([row for row, x in enumerate(real) if x == length], length) for length in set(real)]
    seed = int(torch.randint(2**62, ())) if dropout else 0
    rules = [(term.rule, term.cuts) for term in terms]
    return SyntheticAttention.apply(rules, groups, causal, dropout, seed, v, *tensors)  # type: ignore[return-value]


EqualRows = list[tuple[list[int], int]]  # rows of the batch, and how many real tokens each of them has
ScoreTile = tuple[slice, slice, int]  # heads, queries, and the number of keys they attend to, from 0 on


class SyntheticAttention(torch.autograd.Function):
    """The loop over tiles. Autograd differentiates the terms of a tile; the softmax is differentiated by hand."""

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
                weights = softmax_of(scores_of(rules, inputs, keys), tile, causal)
                if dropout:
                    weights *= masks.like(weights)
                weights, mixable = weights.to(v.dtype), values[heads, :keys]
                if len(rows) == 1:
                    torch.bmm(weights, mixable, out=out[rows[0], heads, queries])
                else:
                    mixed = torch.bmm(weights, mixable)
                    out[rows, heads, queries] = mixed.unflatten(-1, (len(rows), -1)).permute(2, 0, 1, 3)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        v, *tensors = ctx.saved_tensors
        rules, groups, causal, dropout, seed = ctx.settings
        needed, grad_v = ctx.needs_input_grad[6:], torch.zeros_like(v)
        in_place = is_own_gradient(rules, tensors, groups, causal, v.dtype) and needed[0]
        new = torch.empty_like if in_place else torch.zeros_like
        grads = [new(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        masks = DropoutMasks(dropout, seed, v.device)
        for rows, length in groups:
            values, grad_out = (side_by_side(x, rows, length) for x in (v, grad))
            grad_values = torch.zeros_like(values).transpose(1, 2).contiguous()  # faster to add to than (h, n, d)
            for tile in score_tiles(length, v.shape[1], causal):
                heads, queries, keys = tile
                graph = differentiable_scores(rules, tensors, needed, rows[0], tile)
                weights = softmax_of([part.detach() for part in graph[1]], tile, causal)
                places = inputs_of(rules, grads, rows[0], tile)
                given, mixable = grad_out[heads, queries], values[heads, :keys]
                out = places[0] if in_place else SCRATCH.take("gradient", tuple(weights.shape), mixable)
                grad_weights = torch.bmm(given, mixable.transpose(1, 2), out=out).to(weights.dtype)
                used = weights
                if dropout:
                    mask = masks.like(weights)
                    grad_weights *= mask
                    used = weights * mask
                grad_values[heads, :, :keys].baddbmm_(given.transpose(1, 2), used.to(v.dtype))
                if any(needed):
                    softmax_backward_(grad_weights, weights)
                    if not in_place:
                        add_gradients(graph, grad_weights, places)
            grad_v[rows, :, :length] = grad_values.unflatten(1, (len(rows), -1)).permute(1, 0, 3, 2)
        return None, None, None, None, None, grad_v, *grads


def is_own_gradient(rules: list, tensors: list[Tensor], groups: EqualRows, causal: bool, dtype: torch.dtype) -> bool:
    """Is the gradient of the scores all there is of the gradient of the only tensor?

    It is as large as the n×n scores, and then each tile writes its part instead of adding it to zeros. The tensor must
    be the scores themselves, of exactly the real tokens, in a `dtype` of the values that the softmax keeps.
    """
    if causal or len(groups) > 1 or [cuts for _, cuts in rules] != [("qk",)]:
        return False
    scores, length = tensors[0], groups[0][1]
    return scores.shape[2] == length and scores.dtype == dtype == torch.promote_types(dtype, torch.float32)


ScoreGraph = tuple[list[Tensor], list[Tensor]]  # inputs of a tile as leaves, and the scores computed from them


def differentiable_scores(
    rules: list, tensors: Sequence[Tensor], needed: Sequence[bool], row: int, tile: ScoreTile
) -> ScoreGraph:
    """The scores of a tile, with the graph that leads to those inputs whose gradient is needed."""
    inputs = [x.detach() for x in inputs_of(rules, tensors, row, tile)]
    for x, need in zip(inputs, needed, strict=True):
        x.requires_grad_(need)
    with torch.enable_grad():
        return inputs, scores_of(rules, inputs, tile[2])


def add_gradients(graph: ScoreGraph, grad_scores: Tensor, places: list[Tensor | None]) -> None:
    """Add the gradients of a tile's inputs to `places`, the corresponding views of the whole gradients or None."""
    inputs, parts = graph
    wanted = [x for x in inputs if x.requires_grad]
    if len(parts) == 1 and parts[0] is inputs[0]:  # the scores are an input
        found: Sequence[Tensor] = [grad_scores]
    else:
        some = [part for part in parts if part.requires_grad]
        found = torch.autograd.grad(some, wanted, [grad_scores.to(part.dtype) for part in some])
    for place, more in zip([x for x in places if x is not None], found, strict=True):
        place.add_(more)


def score_tiles(length: int, num_heads: int, causal: bool) -> Iterator[ScoreTile]:
    """Heads and queries such that a matrix of weights has at most TILE_ENTRIES."""
    some_heads = max(1, TILE_ENTRIES // max(1, length**2))
    for head in range(0, num_heads, some_heads):
        for queries in query_runs(length):
            yield slice(head, min(head + some_heads, num_heads)), queries, queries.stop if causal else length


def query_runs(length: int) -> list[slice]:
    """The queries of each tile of one head."""
    size = max(1, min(length, TILE_ENTRIES // max(1, length)))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def side_by_side(x: Tensor, rows: list[int], length: int) -> Tensor:
    """Rows of `x` (b, h, n, d) as features of a single row, (h, length, rows·d)."""
    if len(rows) == 1:
        return x[rows[0], :, :length]
    return x[rows, :, :length].permute(1, 2, 0, 3).flatten(2)


def inputs_of(rules: list, tensors: Sequence, row: int, tile: ScoreTile) -> list:
    """Views (heads, …) of the tensors (b or 1, h or 1, …), cut to a tile; None for None."""
    heads, queries, keys = tile
    index = {"q": queries, "k": slice(keys), "-": slice(None)}
    views = []
    for x, cut in zip(tensors, [cut for _, cuts in rules for cut in cuts], strict=True):
        if x is not None:
            x = x[0 if len(x) == 1 else row, slice(None) if x.shape[1] == 1 else heads, index[cut[0]], index[cut[1]]]
        views.append(x)
    return views


def scores_of(rules: list, inputs: list[Tensor], keys: int) -> list[Tensor]:
    """The terms of a tile, (heads, q, keys) each."""
    rest, parts = iter(inputs), []
    for rule, cuts in rules:
        part = rule(*[next(rest) for _ in cuts], keys)
        parts.append(part if part.shape[-1] == keys else part[..., :keys])
    return parts


def softmax_of(parts: list[Tensor], tile: ScoreTile, causal: bool) -> Tensor:
    """Weights (heads, q, keys) of a tile, in float32 or wider, in scratch memory that the next tile overwrites."""
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
