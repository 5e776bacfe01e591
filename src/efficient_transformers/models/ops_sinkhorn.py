"""Sinkhorn normalisation: scores between blocks made a soft permutation of them, both ways and causal."""

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, iterations: int, temperature: float, real: Tensor | None = None) -> Tensor:
    r"""A nearly doubly stochastic matrix, by turns normalising rows and columns of exp(scores / temperature).

    .. math:: g \leftarrow -\log \textstyle\sum_i \exp(s_{ij}/\tau - \log \sum_l \exp(s_{il}/\tau + g_l)), \qquad
              P_{ij} \propto_j \exp(s_{ij}/\tau + g_j)

    Sinkhorn 1964; in logarithms as in Mena et al. 2018 (arXiv:1802.08665) and Tay et al. 2020 (arXiv:2002.11296). Each
    iteration takes the rows and then the columns. At the end the rows are normalized once more, because each
    row is used as a mixture: rows sum to one exactly, columns in the limit. `scores` (…, c, c), in units of
    `temperature`; towards 0 the result is the permutation with the largest sum of scores. `real` (…, c) is True at
    real blocks: rows and columns of the others are zero. Returns (…, c, c) in float32 or wider.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    if real is None:
        for _ in range(iterations):
            scores = scores - scores.logsumexp(-1, keepdim=True)
            scores = scores - scores.logsumexp(-2, keepdim=True)
        return scores.softmax(-1)
    there = real[..., None, :] & real[..., None]
    # finite, so that no row or column has a NaN as value or gradient; masked again, as it is divided by itself
    lowest = torch.finfo(scores.dtype).min / 2
    for _ in range(iterations):
        for axis in (-1, -2):
            scores = scores.masked_fill(~there, lowest)
            scores = scores - scores.logsumexp(axis, keepdim=True)
    return scores.masked_fill(~there, lowest).softmax(-1) * there


def causal_sinkhorn(scores: Tensor, iterations: int, temperature: float) -> Tensor:
    r"""Causal `sinkhorn`: row i has only columns j < i, and depends only on rows up to itself.

    .. math:: P_{ij} \propto_{j<i} \exp(s_{ij}/\tau), \qquad
              P_{ij} \leftarrow \propto_{j<i} P_{ij} \,/\, (1 + \textstyle\sum_{i'<i} P_{i'j}) \quad
              \text{(`iterations` times)}

    A column is divided by what earlier rows have taken of it and the one that this row would take as a whole. Rows
    sum to one, row 0 to zero. Shapes, units and dtype as in `sinkhorn`; padding after the real blocks needs no mask.

    The paper's causal balancing masks its sums to the triangle; those of its columns run over all rows and tell a row
    of later ones. Nor can what it aims at be had: the only strictly triangular matrix whose rows sum to one and whose
    columns do not exceed it is the previous block. Dividing by the rows up to i themselves, Σ_{i'≤i}, gives all of a
    column to its first reader, so that no block but the previous one ever weighs more than a half: of a block that is
    preferred by 13 (scores over temperature), .20 are left after one iteration and .04 after eight, of 64 blocks. By
    the rule here it is 1.00 and .88. That goes to the same limit, more slowly: of 64 blocks with equal scores the
    previous one gets .08, .11, .27, .64 and 1.00 after 0, 1, 4, 8 and 16 iterations.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
    block = torch.arange(scores.shape[-1], device=scores.device)
    before = block < block[:, None]
    scores = scores.masked_fill(~before, torch.finfo(scores.dtype).min / 2)
    for _ in range(iterations):
        taken = scores.softmax(-1) * before
        scores = scores - (taken.cumsum(-2) - taken).log1p()
    return scores.softmax(-1) * before


def gumbel_noise(like: Tensor) -> Tensor:
    """Samples of the standard Gumbel distribution, of the shape, dtype and device of `like`."""
    return torch.empty_like(like).exponential_().clamp(min=torch.finfo(like.dtype).tiny).log().neg()
