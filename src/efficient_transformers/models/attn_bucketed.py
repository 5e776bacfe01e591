"""Softmax attention within groups of tokens that depend on the data: buckets of a hash, clusters.

On a CPU a loop over runs of groups that fit into the cache, with its own backward; elsewhere one batched product.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .attn_pattern_tiled import DropoutMasks
from .ops_bucket_runs import Bundle, GroupRun, bundles, group_runs
from .ops_buckets import BucketLayout
from .ops_engine import choose_engine
from .ops_scratch import SCRATCH


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, layout: BucketLayout, dropout: float = 0.0) -> Tensor:
    r"""Softmax over the keys of all groups that a query is in, O(g·c·m·d).

    .. math:: o_i = \sum_j \frac{c_{ij} \exp(q_i^\top k_j / \sqrt d)}{\sum_l c_{il} \exp(q_i^\top k_l / \sqrt d)} v_j

    with the counts of `BucketLayout`: outputs of the groups are combined by their logsumexp (Kitaev et al. 2020,
    arXiv:2001.04451, appendix A). `q`, `k`, `v` (b, h, n, d). A token without any key attends to itself.
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

    # empty slots write to an extra row at the end
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


class BucketedAttention(torch.autograd.Function):
    """The loop over runs of groups. Keeps its inputs, its output and one normalizer per token.

    With p the softmax weights of one slot, which share the normalizer of all slots of its token, and dp = grad · vᵀ:

        gather      queries, gradients and normalizers at the query slots, keys and values at the key slots
        gradients   ds = p ⊙ (dp - Σ p ⊙ dp);  of q: ds·k, of k: dsᵀ·q, of v: pᵀ·grad
        scatter     added to the tokens, of which several slots hold the same
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: BucketLayout, dropout: float, seed: int) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, norm = torch.empty_like(v), v.new_empty(v.shape[:3], dtype=wide)
        alone = torch.zeros(v.shape[:3], dtype=torch.bool)
        lowest = torch.finfo(wide).min / 2  # finite, so that a row of it has a softmax; below every score
        masks, scale = DropoutMasks(dropout, seed, q.device), q.shape[-1] ** -0.5
        for bundle in bundles(layout, q.shape[2]):
            queries, keys, values = bundle.of(q), bundle.of(k), bundle.of(v)
            token = bundle.queries.flatten()
            mixed = SCRATCH.take("mixed slots", (len(token), values.shape[-1]), values)
            total = torch.empty(len(token), dtype=wide)
            for run in group_runs(bundle, wide):
                weights, *_ = scores_of(run, queries, keys, scale, wide)
                run.mask_(weights, lowest)
                largest = weights.amax(-1)
                torch.softmax(weights, -1, out=weights)
                # the largest weight is exp(largest - logsumexp); slots without keys are empty and never used
                total[run.slots] = (largest - weights.amax(-1).log()).flatten()
                if dropout:
                    weights *= masks.like(weights)
                part = mixed[run.slots].unflatten(0, (-1, run.size))
                torch.bmm(weights.to(values.dtype), run.gather_keys("values", values), out=part)
            results = combine(mixed, total, token, len(values), lowest)
            for result, rows in zip((out, norm, alone), results, strict=True):
                bundle.put(result, rows)
        ctx.save_for_backward(q, k, v, out, norm, alone)
        ctx.settings = layout, dropout, seed
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, norm, alone = ctx.saved_tensors
        layout, dropout, seed = ctx.settings
        grads = [torch.empty_like(x) for x in (q, k, v)]
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, seed, q.device)
        inner = (grad * out).sum(-1, dtype=norm.dtype)  # Σ p ⊙ dp of all slots of a token
        # the score with itself of a token that has no other key, as `combine` assumes it
        self_score = torch.zeros_like(norm).masked_fill_(~alone, torch.finfo(norm.dtype).min / 2)
        for bundle in bundles(layout, q.shape[2]):
            rows = GradientRows(bundle, *map(bundle.of, (q, k, v, grad, norm, inner, alone, self_score)))
            sums = rows.sums()
            for run in group_runs(bundle, norm.dtype):
                rows.add_run(run, sums, scale, masks if dropout else None)
            sums[0].mul_(scale)
            for result, of_bundle in zip(grads, sums, strict=True):
                bundle.put(result, of_bundle)
        return *grads, None, None, None


class GradientRows(NamedTuple):
    """The rows of a bundle's tokens that the backward pass gathers: (t, d) and (t,)."""

    bundle: Bundle
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    norm: Tensor
    inner: Tensor
    alone: Tensor
    self_score: Tensor

    def sums(self) -> list[Tensor]:
        """Zeros for the gradients of q, k and v, in whole rows; scattering into parts of rows is ten times slower."""
        named = zip("qkv", (self.q, self.k, self.v), strict=True)
        return [SCRATCH.take(f"{name} sum of slots", x.shape, x).zero_() for name, x in named]

    def add_run(self, run: GroupRun, sums: list[Tensor], scale: float, masks: DropoutMasks | None) -> None:
        """Add the gradients of a run to `sums`; that of q still lacks the factor `scale`."""
        # gather
        weights, queries, keys = scores_of(run, self.q, self.k, scale, self.norm.dtype)
        run.mask_(weights, run.per_query(self.self_score).squeeze(-1))
        empty = self.bundle.queries.flatten()[run.slots].view(-1, run.size, 1) < 0
        # p = exp(s - norm); the norm of empty slots is infinite, so that their weights are zero
        weights.sub_(run.per_query(self.norm).masked_fill(empty, float("inf"))).exp_()
        grad_out = run.gather("gradient rows", self.grad)

        # gradients
        values = run.gather_keys("values", self.v)
        grad_scores = product(grad_out, values.transpose(1, 2), "gradient", self.norm.dtype)
        used = weights
        if masks is not None:
            mask = masks.like(weights)
            grad_scores *= mask
            used = weights * mask
        grad_v = torch.bmm(used.to(self.v.dtype).transpose(1, 2), grad_out)
        grad_scores.sub_(run.per_query(self.inner)).mul_(weights)
        if masks is not None:  # the output of a token that is its only key does not depend on its score
            grad_scores.masked_fill_(run.per_query(self.alone), 0)
        grad_scores = grad_scores.to(self.q.dtype)

        # scatter
        run.scatter_keys(sums[2], grad_v)
        run.scatter_keys(sums[1], torch.bmm(grad_scores.transpose(1, 2), queries))
        run.scatter(sums[0], torch.bmm(grad_scores, keys))


def product(left: Tensor, right: Tensor, name: str, wide: torch.dtype) -> Tensor:
    """left @ right, multiplied in their dtype and returned in `wide`, in scratch memory."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    narrow = torch.bmm(left, right, out=SCRATCH.take(f"{name} of slots", shape, left))
    if narrow.dtype == wide:
        return narrow
    return SCRATCH.take(f"{name} of slots", shape, torch.empty(0, dtype=wide)).copy_(narrow)


def scores_of(run: GroupRun, q: Tensor, k: Tensor, scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a run, (g, c, m), with the scaled queries, (g, c, d), and the keys, (g, m, d), they are made of."""
    queries, keys = run.gather("query", q).mul_(scale), run.gather_keys("keys", k)
    return product(queries, keys.transpose(1, 2), "weights", wide), queries, keys


def combine(mixed: Tensor, total: Tensor, token: Tensor, length: int, lowest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the outputs `mixed` (s, d) of the slots of each `token` (s,), weighted by exp(`total`) (s,).

    Returns the outputs (n, d), the normalizers (n,) and whether a token had no key but itself (n,). The normalizer is
    the logsumexp of the totals; for a token alone, the logarithm of the number of its slots, as for scores of 0.
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
