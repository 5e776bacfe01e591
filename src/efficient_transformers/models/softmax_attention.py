"""Softmax attention with the n×m matrix written out: the reference every faster path must equal."""

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Masked scaled dot-product attention and its weights, O(n·m·d).

    .. math:: o_i = \sum_{j \in S(i)} \mathrm{softmax}_{j \in S(i)}(q_i^\top k_j / \sqrt d)\, v_j

    Vaswani et al. 2017 (arXiv:1706.03762), eq. 1. `q` (b, h, n, d), `k` and `v` (b, h, m, d); `allowed` is True where
    a query may read, bool, broadcastable to (b, h, n, m). A query that may read nothing gives zeros.
    Returns the output (b, h, n, d) and the weights (b, h, n, m), both in `v.dtype`; the softmax runs in float32 or
    wider. `dropout` is applied to the weights that are used and not to those returned.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # the lowest finite number and a second mask instead of -inf, so that a row without keys has neither NaN values
    # nor NaN gradients
    scores = scores.to(wide).masked_fill(~allowed, torch.finfo(wide).min)
    weights = (scores.softmax(-1) * allowed).to(v.dtype)
    return F.dropout(weights, dropout) @ v, weights
