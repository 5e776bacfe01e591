"""Softmax attention with the n×m matrix written out: the reference every faster path must equal."""

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Masked scaled dot-product attention and its weights, O(n·m·d).

    .. math:: o_i = \sum_{j \in S(i)} \mathrm{softmax}_{j \in S(i)}(q_i^\top k_j / \sqrt d)\, v_j

    Vaswani et al. 2017 (arXiv:1706.03762), eq. 1. `q` (b, h, n, d), `k` and `v` (b, h, m, d); `allowed` is True where
    a query attends to a key, bool, or the number of times it does, int64; broadcastable to (b, h, n, m). The output of
    a query without keys is zero.
    Returns the output (b, h, n, d) and the weights (b, h, n, m), both in `v.dtype`; the softmax runs in float32 or
    wider. `dropout` applies to the output, not to the returned weights.
    """
    weights = masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, allowed).to(v.dtype)
    return F.dropout(weights, dropout) @ v, weights


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """The weights of `softmax_attention` from `scores` (b, h, n, m), in float32 or wider."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide)
    if allowed.dtype != torch.bool:  # the weight of a key that counts c times is c·exp(s) = exp(s + log c)
        scores, allowed = scores + allowed.clamp(min=1).to(wide).log(), allowed > 0
    # the lowest finite number and a second mask instead of -inf, so that rows without keys have no NaN values or
    # gradients
    scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    return scores.softmax(-1) * allowed


def folded_attention(
    q: Tensor,
    hidden: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    padding_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    r"""`softmax_attention` of a few queries, without computing keys and values, O(g·h·n·e).

    .. math:: q_i^\top (W_k x_j + b_k) = (W_k^\top q_i)^\top x_j + q_i^\top b_k, \qquad
              \sum_j p_{ij} (W_v x_j + b_v) = W_v \sum_j p_{ij} x_j + b_v \sum_j p_{ij}

    Two projections of the whole sequence cost O(n·e²), more than this while g·h < e. `q` (b, h, g, d), `hidden`
    (b, n, e), weights (h·d, e) and biases (h·d,) as in `nn.Linear`; `padding_mask` (b, n) is True at real tokens.
    Returns (b, h, g, d) in `q.dtype`; the softmax runs in float32 or wider.
    """
    _, heads, count, dim = q.shape
    q = q * dim**-0.5
    queries = torch.einsum("bhgd,hde->bhge", q, k_weight.unflatten(0, (heads, dim))).flatten(1, 2)
    scores = (queries @ hidden.transpose(1, 2)).unflatten(1, (heads, count))  # (b, h, g, n)
    scores = scores + (q * k_bias.view(heads, 1, dim)).sum(-1, keepdim=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide)
    if padding_mask is not None:
        scores = scores.masked_fill(~padding_mask[:, None, None], torch.finfo(wide).min)
    weights = F.dropout(scores.softmax(-1).to(hidden.dtype), dropout)
    mixed = (weights.flatten(1, 2) @ hidden).unflatten(1, (heads, count))  # (b, h, g, e)
    out = torch.einsum("bhge,hde->bhgd", mixed, v_weight.unflatten(0, (heads, dim)))
    return out + weights.sum(-1, keepdim=True) * v_bias.view(heads, 1, dim)
