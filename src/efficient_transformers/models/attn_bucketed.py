"""Softmax attention inside groups of tokens that the data has chosen: buckets of a hash, clusters.

A loop over cache-sized runs of groups with its own backward on a CPU, one batched product of all groups elsewhere.
Heads of short sequences share a turn of the loop.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .attn_pattern_tiled import DropoutMasks
from .ops_buckets import BucketLayout
from .ops_engine import choose_engine
from .ops_tiles import RUN_ENTRIES, SCRATCH

# Slots of the heads that share a turn of the loop, by measurement. A training step of two layers over 32 padded rows of
# 64 tokens, 4 heads, 4 rounds of chunks of 8, takes 1,200 ms head by head, as each operation is called for a few
# numbers, and 160 so; twice or four times as many slots gain nothing.
BUNDLE_SLOTS = 2**14


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, layout: BucketLayout, dropout: float = 0.0) -> Tensor:
    r"""Softmax over the keys of all groups that a query stands in, O(g·c·m·d).

    .. math:: o_i = \sum_j \frac{c_{ij} \exp(q_i^\top k_j / \sqrt d)}{\sum_l c_{il} \exp(q_i^\top k_l / \sqrt d)} v_j

    with the counts of `BucketLayout`: what the groups say is combined by their logsumexp (Kitaev et al. 2020,
    arXiv:2001.04451, appendix A). `q`, `k`, `v` (b, h, n, d). A token that has nothing to read reads itself.
    Returns (b, h, n, d) in `v.dtype`, zeros at padding. Products run in the input's dtype, softmax and logsumexp in
    float32 or wider.
    """
    if choose_engine(q.device) == "tiled":
        seed = int(torch.randint(2**62, ())) if dropout else 0
        out = BucketedAttention.apply(q, k, v, layout, dropout, seed)
    else:
        out = batched_attention(q, k, v, layout, dropout)
    return out if layout.missed is None else out + v * layout.missed[..., None]  # type: ignore[return-value]


def batched_attention(q: Tensor, k: Tensor, v: Tensor, layout: BucketLayout, dropout: float) -> Tensor:
    """`bucketed_attention` for all groups at once, in plain operations."""
    length, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    queries, keys, allowed = layout.queries, layout.key_tokens(), layout.allowed()
    scores = (rows(q, queries) * q.shape[-1] ** -0.5) @ rows(k, keys).transpose(-1, -2)
    scores = scores.to(wide).masked_fill(~allowed, torch.finfo(wide).min)
    if not layout.own:
        oneself = layout.itself()
        scores, allowed = scores.masked_fill(oneself, torch.finfo(wide).min / 2), allowed | oneself
    weights = (scores.softmax(-1) * allowed).to(v.dtype)
    mixed = (F.dropout(weights, dropout) @ rows(v, keys)).flatten(2, 3)  # (b, h, g·c, d)

    # empty slots write behind the sequence
    token = torch.where(queries < 0, length, queries).flatten(2)
    total = scores.logsumexp(-1).flatten(2)
    largest = total.new_full((*q.shape[:2], length + 1), torch.finfo(wide).min)
    largest = largest.scatter_reduce(2, token, total.detach(), "amax")
    share = (total - largest.gather(2, token)).exp()
    norm = torch.zeros_like(largest).scatter_add(2, token, share)
    share = (share / norm.gather(2, token)).to(v.dtype)
    out = v.new_zeros(*v.shape[:2], length + 1, v.shape[-1])
    out = out.scatter_add(2, token[..., None].expand_as(mixed), mixed * share[..., None])
    return out[:, :, :length]


def rows(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `x` (b, h, n, d) at `tokens` (b, h, g, c): (b, h, g, c, d); any row at empty slots."""
    index = tokens.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, tokens.shape[2:])


class Bundle(NamedTuple):
    """Heads of some rows as if they were one: their tokens stand one head behind another, and so do their groups.

    Groups without a token are left out. Equal labels stand side by side, so nobody reads across the gap.
    """

    layout: BucketLayout  # of the batch
    part: tuple[slice, slice]  # its rows, their heads
    queries: Tensor  # (g, c)
    keys: Tensor | None  # (g, m)
    labels: Tensor | None  # (g, c)

    def of(self, x: Tensor) -> Tensor:
        """(b, h, n, …) -> all tokens of the bundle, (t, …): a copy of several heads, a view of one."""
        return x[self.part].flatten(0, 2)

    def put(self, x: Tensor, rows: Tensor) -> None:
        here = x[self.part]
        here.copy_(rows.view(here.shape))


def bundles(layout: BucketLayout, length: int) -> Iterator[Bundle]:
    """All heads of a batch of `length` tokens, in bundles of up to BUNDLE_SLOTS slots."""
    batch, num_heads, groups, size = layout.queries.shape
    heads_per_bundle = max(1, BUNDLE_SLOTS // (groups * size))
    rows, heads = max(1, heads_per_bundle // num_heads), min(heads_per_bundle, num_heads)
    for row in range(0, batch, rows):
        for head in range(0, num_heads, heads):
            part = slice(row, row + rows), slice(head, head + heads)
            filled = (layout.queries[part] >= 0).any(-1)
            count = filled.shape[0] * filled.shape[1]
            queries = one_behind_another(layout.queries[part], filled, 1, length)
            keys = None if layout.keys is None else one_behind_another(layout.keys[part], filled, 1, length)
            labels = None if layout.labels is None else one_behind_another(layout.labels[part], filled, count, 1)
            yield Bundle(layout, part, queries, keys, labels)


def one_behind_another(x: Tensor, filled: Tensor, factor: int, step: int) -> Tensor:
    """Slots of several heads (b, h, g, …) -> those of the `filled` groups (b, h, g), with a number apart in each head.

    Head i of them all has x · `factor` + i · `step` for x; empty slots stay as they are.
    """
    batch, heads, _ = filled.shape
    if batch * heads > 1:
        number = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
        x = torch.where(x < 0, x, x * factor + number * step)
    x = x.flatten(0, 2)
    return x if bool(filled.all()) else x[filled.flatten()]


class GroupRun(NamedTuple):
    """Neighbouring groups of a bundle: where their rows stand, and what they must not read."""

    queries: Tensor  # (g·c,) tokens, 0 at empty slots
    keys: Tensor  # (g·m,), or ((g + 1)·c,) where a group reads the one before it
    size: int  # c
    forbidden: Tensor  # broadcastable to (g, c, m): True where a key must not be read
    band: Tensor | None  # (c, m), 0 and -inf: what no group may read
    slots: slice  # of the query slots of the head
    overlaps: bool
    own: bool

    def windows(self, x: Tensor) -> Tensor:
        """Rows at `keys` -> (g, m, d), a view."""
        if not self.overlaps:
            return x.unflatten(0, (len(self.queries) // self.size, -1))
        groups, dim = len(self.queries) // self.size, x.shape[-1]
        return x.as_strided((groups, 2 * self.size, dim), (self.size * dim, dim, 1))

    def add(self, x: Tensor, grad: Tensor) -> None:
        """x[keys] += grad (g, m, d), in place."""
        if self.overlaps:
            before, here = grad.split(self.size, 1)
            grad = SCRATCH.take("folded slots", (len(self.keys), x.shape[-1]), x)
            grad[self.size :] = here.flatten(0, 1)
            grad[: self.size] = 0
            grad[: -self.size] += before.flatten(0, 1)
        else:
            grad = grad.flatten(0, 1)
        x.index_add_(0, self.keys, grad)

    def mask_(self, scores: Tensor, alone: Tensor | float) -> None:
        """Forbid in place, and give a slot's score with itself the value `alone`, a number or (g, c)."""
        scores.masked_fill_(self.forbidden, float("-inf"))
        if self.band is not None:
            scores.add_(self.band)
        if not self.own:
            diagonal = scores.diagonal(scores.shape[2] - self.size, 1, 2)
            diagonal.copy_(alone) if isinstance(alone, Tensor) else diagonal.fill_(alone)


def group_runs(bundle: Bundle, dtype: torch.dtype) -> Iterator[GroupRun]:
    """All groups of a bundle, in runs that fit into the cache."""
    layout, tokens = bundle.layout, bundle.queries
    size = tokens.shape[-1]
    groups_per_run = max(1, RUN_ENTRIES // (size * layout.keys_per_group))
    band = causal_band(size, dtype, tokens.device) if layout.causal and layout.keys is None else None
    for first in range(0, len(tokens), groups_per_run):
        here = tokens[first : first + groups_per_run]
        queries, part = here.flatten().clamp(min=0), slice(first * size, (first + len(here)) * size)
        if bundle.keys is not None:
            keys = bundle.keys[first : first + groups_per_run]
            forbidden = (keys < 0)[:, None]
            if layout.causal:
                forbidden = forbidden | (keys[:, None] > here[..., None])
            if not layout.own:
                forbidden = forbidden | (keys[:, None] == here[..., None])
            yield GroupRun(queries, keys.flatten().clamp(min=0), size, forbidden, band, part, False, layout.own)
            continue
        assert bundle.labels is not None
        labels = bundle.labels[first : first + groups_per_run]
        if first:
            before, before_label = tokens[first - 1], bundle.labels[first - 1]
        else:
            before, before_label = torch.zeros_like(tokens[0]), torch.full_like(tokens[0], -2)
        keys = torch.cat([before.clamp(min=0), queries])
        around = torch.cat([before_label, labels.flatten()]).as_strided((len(here), 2 * size), (size, 1))
        # an empty slot is no key, so it must not equal itself
        forbidden = around[:, None] != labels.masked_fill(labels < 0, -3)[..., None]
        yield GroupRun(queries, keys, size, forbidden, band, part, True, layout.own)


def causal_band(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(c, 2c), 0 where key slot j lies at most c slots before query slot c + i, and not behind it; -inf elsewhere."""
    i, j = torch.arange(size, device=device)[:, None], torch.arange(2 * size, device=device)
    return torch.zeros(size, 2 * size, dtype=dtype, device=device).masked_fill_((j < i) | (j > size + i), float("-inf"))


class BucketedAttention(torch.autograd.Function):
    """The loop over runs of groups. Keeps its inputs, its output and one normaliser per token."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: BucketLayout, dropout: float, seed: int) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, norm = torch.empty_like(v), v.new_empty(v.shape[:3], dtype=wide)
        alone = torch.zeros(v.shape[:3], dtype=torch.bool)
        lowest = torch.finfo(wide).min / 2  # finite: below every score, and a row of it has a softmax
        masks, scale = DropoutMasks(dropout, seed, q.device), q.shape[-1] ** -0.5
        for bundle in bundles(layout, q.shape[2]):
            x, y, z = bundle.of(q), bundle.of(k), bundle.of(v)
            token = bundle.queries.flatten()
            mixed = SCRATCH.take("mixed slots", (len(token), z.shape[-1]), z)
            total = torch.empty(len(token), dtype=wide)
            for run in group_runs(bundle, wide):
                weights = scores_of(run, x, y, scale, wide)
                run.mask_(weights, lowest)
                largest = weights.amax(-1)
                torch.softmax(weights, -1, out=weights)
                # the largest weight is exp(largest - logsumexp); a slot without keys is empty, and nobody asks for it
                total[run.slots] = (largest - weights.amax(-1).log()).flatten()
                if dropout:
                    weights *= masks.like(weights)
                values = run.windows(take(z, run.keys, "values"))
                part = mixed[run.slots].unflatten(0, (-1, run.size))
                torch.bmm(weights.to(z.dtype), values, out=part)
            for result, rows in zip((out, norm, alone), combine(mixed, total, token, len(z), lowest), strict=True):
                bundle.put(result, rows)
        ctx.save_for_backward(q, k, v, out, norm, alone)
        ctx.settings = layout, dropout, seed
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, norm, alone = ctx.saved_tensors
        layout, dropout, seed = ctx.settings
        wide = norm.dtype
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        lowest = torch.finfo(wide).min / 2
        masks, scale = DropoutMasks(dropout, seed, q.device), q.shape[-1] ** -0.5
        inner = (grad * out).sum(-1, dtype=wide)  # Σ_j p_ij · ∂/∂p_ij
        lone = torch.zeros_like(norm).masked_fill_(~alone, lowest)
        for bundle in bundles(layout, q.shape[2]):
            x, y, z = bundle.of(q), bundle.of(k), bundle.of(v)
            grad_of, norm_of, lone_of, inner_of, alone_of = map(bundle.of, (grad, norm, lone, inner, alone))
            # summed in whole rows: scattered into parts of rows it takes ten times as long
            sums = [
                SCRATCH.take(f"{name} sum of slots", w.shape, w).zero_()
                for name, w in zip("qkv", (x, y, z), strict=True)
            ]
            empty = bundle.queries.flatten() < 0
            for run in group_runs(bundle, wide):
                shape = (-1, run.size, 1)
                queries = SCRATCH.take("query rows", (len(run.queries), x.shape[-1]), x)
                weights = scores_of(run, x, y, scale, wide)
                run.mask_(weights, lone_of[run.queries].view(shape[:2]))
                # all rounds have one normaliser; at empty slots it is infinite, so that they weigh nothing
                normaliser = norm_of[run.queries].masked_fill(empty[run.slots], float("inf"))
                weights.sub_(normaliser.view(shape)).exp_()
                grad_out = take(grad_of, run.queries, "gradient rows").unflatten(0, (-1, run.size))
                values = run.windows(take(z, run.keys, "values"))
                grad_scores = product(grad_out, values.transpose(1, 2), "gradient", wide)
                used = weights
                if dropout:
                    mask = masks.like(weights)
                    grad_scores *= mask
                    used = weights * mask
                run.add(sums[2], torch.bmm(used.to(z.dtype).transpose(1, 2), grad_out))
                grad_scores.sub_(inner_of[run.queries].view(shape)).mul_(weights)
                if dropout:  # a token that reads itself alone has no score to learn
                    grad_scores.masked_fill_(alone_of[run.queries].view(shape), 0)
                grad_scores = grad_scores.to(x.dtype)
                queries = queries.unflatten(0, (-1, run.size))  # scaled, by `scores_of`
                run.add(sums[1], torch.bmm(grad_scores.transpose(1, 2), queries))
                keys = run.windows(take(y, run.keys, "keys"))
                sums[0].index_add_(0, run.queries, torch.bmm(grad_scores, keys).flatten(0, 1))
            sums[0].mul_(scale)
            for result, rows in zip((grad_q, grad_k, grad_v), sums, strict=True):
                bundle.put(result, rows)
        return grad_q, grad_k, grad_v, None, None, None


def take(x: Tensor, tokens: Tensor, name: str) -> Tensor:
    """Rows of `x` (n, d), in memory that the next call with this name uses again."""
    return torch.index_select(x, 0, tokens, out=SCRATCH.take(f"{name} of slots", (len(tokens), x.shape[-1]), x))


def product(left: Tensor, right: Tensor, name: str, wide: torch.dtype) -> Tensor:
    """left @ right in their dtype, widened."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    narrow = torch.bmm(left, right, out=SCRATCH.take(f"{name} of slots", shape, left))
    if narrow.dtype == wide:
        return narrow
    return SCRATCH.take(f"{name} of slots", shape, torch.empty(0, dtype=wide)).copy_(narrow)


def scores_of(run: GroupRun, q: Tensor, k: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """Scaled products of a run's queries and keys, (g, c, m); leaves the scaled queries in "query rows"."""
    queries = torch.index_select(q, 0, run.queries, out=SCRATCH.take("query rows", (len(run.queries), q.shape[-1]), q))
    keys = run.windows(take(k, run.keys, "keys"))
    return product(queries.mul_(scale).unflatten(0, (-1, run.size)), keys.transpose(1, 2), "weights", wide)


def combine(mixed: Tensor, total: Tensor, token: Tensor, length: int, lowest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Add up what the slots of each token have read, `mixed` (s, d), in proportion to exp(`total`).

    Returns the sums (n, d), the logsumexp of the totals of each token, and whether it had nothing but itself: then the
    logarithm of the number of its slots stands there, as if its score with itself were 0.
    """
    if bool((token < 0).any()):
        filled = (token >= 0).nonzero().flatten()
        mixed, total, token = mixed[filled], total[filled], token[filled]
    largest = total.new_full((length,), float("-inf")).scatter_reduce_(0, token, total, "amax")
    share = (total - largest[token]).exp()
    norm = torch.zeros_like(largest).index_add_(0, token, share)
    share /= norm[token]
    sums = SCRATCH.take("sum of slots", (length, mixed.shape[1]), mixed).zero_()
    sums.index_add_(0, token, mixed.mul_(share.to(mixed.dtype)[:, None]))
    alone = (largest <= lowest) & (norm > 0)
    return sums, torch.where(alone, norm.log(), largest + norm.log()), alone
