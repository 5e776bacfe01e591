"""Attention of blocks to themselves and to sorted blocks: mixtures of all blocks, by a soft permutation of them.

A loop over runs of blocks on a CPU, with its own backward; batched products for tracing and for other devices.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .attn_pattern_tiled import DropoutMasks, softmax_backward_
from .ops_engine import choose_engine
from .ops_scratch import SCRATCH
from .ops_tiles import RUN_ENTRIES
from .ops_tracing import count_blocks, is_traced

LEAST = 1e-20  # smallest part of a sorted token that counts, so that division by it stays finite in float32
KeysValuesBias = tuple[Tensor, Tensor, Tensor | None]  # (…, m, d) twice, and a bias of the scores, (…, 1 or r, m)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """(…, n, d) -> (…, c, size, d); the last block is padded with arbitrary finite values."""
    length = x.shape[-2]
    if isinstance(length, int) and not is_traced():
        return (
            F.pad(x, (0, 0, 0, -length % size)).unflatten(-2, (-1, size))
            if length % size
            else x.unflatten(-2, (-1, size))
        )
    # selected by index, where folding a padded sequence would make a traced length a multiple of the block
    index = torch.arange(count_blocks(length, size) * size, device=x.device).clamp(max=length - 1)
    return x.index_select(-2, index).unflatten(-2, (-1, size))


def real_tokens(like: Tensor, size: int, padding_mask: Tensor | None) -> Tensor | None:
    """(b or 1, c, size), True at the real tokens of `like` (b, n, …) in blocks; None if all are real."""
    length = like.shape[1]
    if padding_mask is None and isinstance(length, int) and length % size == 0:
        return None
    real = torch.ones(1, length, dtype=torch.bool, device=like.device) if padding_mask is None else padding_mask
    count = count_blocks(length, size)
    position = torch.arange(count * size, device=like.device)
    there = real.index_select(1, position.clamp(max=length - 1)) & (position < length)
    return there.unflatten(1, (-1, size))


def sort_blocks(x: Tensor, order: Tensor, mass: Tensor | None = None) -> Tensor:
    r"""Mixtures of blocks, token by token: :math:`\tilde x_{it} = \sum_j P_{ij} x_{jt} / m_{it}`, O(r·n·d).

    `x` (b, h, c, s, d), zero where there is no token; `order` P (b, h, r, c); `mass` m (b, h, r, s), what of row i
    lies on blocks with a token t, or None where all have. Returns (b, h, r, s, d) in `x.dtype`.
    """
    mixed = (order @ x.flatten(3)).unflatten(3, x.shape[3:])
    return mixed if mass is None else (mixed / mass[..., None].clamp(min=LEAST)).to(x.dtype)


def sinkhorn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    real: Tensor | None = None,
    causal: bool = False,
    sortcut: bool = False,
    dropout: float = 0.0,
    first: int = 0,
) -> Tensor:
    r"""Softmax over a query's own block and the sorted block in its place, O(n·(s + c)·d) for c blocks of s tokens.

    .. math:: o_{it} = \sum_u p_{tu} v_{iu} + \tilde p_{tu} \tilde v_{iu}, \qquad
              [p_t, \tilde p_t] = \mathrm{softmax}_u[q_{it}^\top k_{iu}/\sqrt d,\;
              q_{it}^\top \tilde k_{iu}/\sqrt d + \log m_{iu}]

    Tay et al. 2020 (arXiv:2002.11296), with `sort_blocks` for :math:`\tilde k, \tilde v, m`: a sorted token that is
    partly padding is weighted by its real part. With `sortcut` all queries attend to all sorted blocks and nothing else
    (section 3.4, SortCut). With `causal` a query attends to its own block up to itself, and the `order` is strictly
    triangular.

    `q` (b, h, r, s, d) are the blocks from number `first` on, of `k` and `v` (b, h, c, s, d) all from 0 on; `order`
    (b, h, r, c), or any number of rows with `sortcut`; `real` (b or 1, c, s) is True at tokens, None if all are.
    Returns (b, h, r, s, d) in `v.dtype`, anything finite at padding. Products run in the input's dtype, the softmax
    inside is float32 or wider.
    """
    order, real = order.to(v.dtype), None if causal else real  # causal rows attend to whole blocks; padding comes later
    k, v = (x if real is None else x * real[:, None, ..., None] for x in (k, v))
    mass = mass_of(order, real)
    # the paper adds the scores of the two blocks before the softmax; here each token is a separate key
    own_bias, bias = biases(q, order, real, mass, causal, first)
    sorted_k, sorted_v = sort_blocks(k, order, mass), sort_blocks(v, order, mass)
    if sortcut:
        queries, bias = q.flatten(2, 3), None if bias is None else bias.flatten(2)[..., None, :]
        reads = [(sorted_k.flatten(2, 3), sorted_v.flatten(2, 3), bias)]
    else:
        queries, reads = q, [(k[:, :, first:], v[:, :, first:], own_bias), (sorted_k, sorted_v, bias)]
    if choose_engine(q.device) == "tiled":
        seed = int(torch.randint(2**62, ())) if dropout else 0
        flat = [None if x is None else x.flatten(0, -3) for read in reads for x in read]
        out = GroupedAttention.apply(queries.flatten(0, -3), dropout, seed, *flat).view(queries.shape)  # type: ignore[union-attr]
    else:
        weights = F.dropout(joint_softmax(queries, [(keys, x) for keys, _, x in reads]), dropout)
        parts = weights.split([keys.shape[-2] for keys, _, _ in reads], -1)
        mixed = [part @ values for part, (_, values, _) in zip(parts, reads, strict=True)]
        out = sum(mixed[1:], mixed[0])
    return out.unflatten(2, (-1, q.shape[3])) if sortcut else out


def sinkhorn_matrix(
    q: Tensor, k: Tensor, order: Tensor, real: Tensor | None = None, causal: bool = False, sortcut: bool = False
) -> Tensor:
    r"""The weights of `sinkhorn_attention` written out over the tokens, (b, h, c·s, c·s) in `q.dtype`.

    .. math:: W_{(it)(ju)} = [i = j]\, p_{tu} + \tilde p_{tu} P_{ij} / m_{iu}
    """
    order, real = order.to(k.dtype), None if causal else real
    mass, size = mass_of(order, real), q.shape[3]
    k = k if real is None else k * real[:, None, ..., None]
    own_bias, bias = biases(q, order, real, mass, causal, 0)
    sorted_k = sort_blocks(k, order, mass)
    share = order[..., None].expand(*order.shape, size)  # (b, h, r, c, s), of a sorted token
    if real is not None and mass is not None:
        share = (share * real[:, None, None] / mass[:, :, :, None].clamp(min=LEAST)).to(k.dtype)
    if sortcut:
        bias = None if bias is None else bias.flatten(2)[..., None, :]
        weights = joint_softmax(q.flatten(2, 3), [(sorted_k.flatten(2, 3), bias)]).unflatten(-1, (-1, size))
        return torch.einsum("bhniu,bhiju->bhnju", weights, share).flatten(3)
    own, other = joint_softmax(q, [(k, own_bias), (sorted_k, bias)]).chunk(2, -1)  # (b, h, c, s, s) each
    here = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    whole = own[..., None, :] * here[:, None, :, None] + other[..., None, :] * share[:, :, :, None]
    return whole.flatten(4).flatten(2, 3)


def mass_of(order: Tensor, real: Tensor | None) -> Tensor | None:
    """The real part of each sorted token, (b, h, r, s) in float32 or wider, from `real` (b or 1, c, s)."""
    wide = torch.promote_types(order.dtype, torch.float32)
    return None if real is None else order.to(wide) @ real[:, None].to(wide)


def biases(
    q: Tensor, order: Tensor, real: Tensor | None, mass: Tensor | None, causal: bool, first: int
) -> tuple[Tensor | None, Tensor | None]:
    """Biases on the scores of a block's own tokens and of the sorted ones, (b, h, r, 1, s) or for each query."""
    lowest = torch.finfo(q.dtype).min / 2  # finite, because a block of padding has no keys
    size, number = q.shape[3], torch.arange(order.shape[2], device=q.device)[:, None] + first
    if causal:
        token = torch.arange(size, device=q.device)
        own = q.new_zeros(1, 1, 1, size, size).masked_fill(token > token[:, None], lowest)
        if first:
            return own, None
        nothing = q.new_zeros(number.shape).masked_fill(number == 0, lowest)  # there is no block before block 0
        return own, nothing.expand(*q.shape[:3], size)[..., None, :]
    if real is None or mass is None:
        return None, None
    own = q.new_zeros(real.shape).masked_fill(~real, lowest)[:, None, :, None]
    there = mass.clamp(min=LEAST).log().to(q.dtype).masked_fill(mass < LEAST, lowest)
    return own.expand(*q.shape[:2], *own.shape[2:]), there[..., None, :]


def joint_softmax(q: Tensor, reads: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """softmax(q·k / √d + bias) over the keys of all reads: (…, r, m) in the dtype of `q`."""
    wide, q = torch.promote_types(q.dtype, torch.float32), q * q.shape[-1] ** -0.5
    scores = [q @ k.transpose(-1, -2) if bias is None else q @ k.transpose(-1, -2) + bias for k, bias in reads]
    return torch.cat(scores, -1).to(wide).softmax(-1).to(q.dtype)


class GroupedAttention(torch.autograd.Function):
    """Softmax attention of groups of queries (g, r, d) over the keys of all their reads; (g, r, d).

    Stores only its inputs; backward recomputes the weights, run by run, so that they never leave the cache. A bias
    (g, 1, m) gets a gradient.
    """

    @staticmethod
    def forward(ctx, q: Tensor, dropout: float, seed: int, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, *tensors)
        ctx.dropout, ctx.seed = dropout, seed
        reads, out = as_reads(tensors), torch.empty_like(q)
        masks = DropoutMasks(dropout, seed, q.device)
        for run in block_runs(q, reads):
            weights = weights_of_run(q, reads, run, joined("rows", [k for k, _, _ in reads], run))
            if dropout:
                weights *= masks.like(weights)
            out[run] = torch.bmm(weights, joined("rows", [v for _, v, _ in reads], run))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, *tensors = ctx.saved_tensors
        reads, dropout = as_reads(tensors), ctx.dropout
        grad_q = torch.empty_like(q)
        needed = [*ctx.needs_input_grad[3:]]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        scale, masks = q.shape[-1] ** -0.5, DropoutMasks(dropout, ctx.seed, q.device)
        for run in block_runs(q, reads):
            keys = joined("keys", [k for k, _, _ in reads], run)
            weights = weights_of_run(q, reads, run, keys)
            grad_out, groups = grad[run], run[0]
            values = joined("values", [v for _, v, _ in reads], run)
            grad_scores = SCRATCH.take("gradient", tuple(weights.shape), weights)
            torch.bmm(grad_out, values.transpose(1, 2), out=grad_scores)
            used = weights
            if dropout:
                mask = masks.like(weights)
                grad_scores *= mask
                used = weights * mask
            softmax_backward_(grad_scores, weights)
            start = 0
            for number, (k, _, _) in enumerate(reads):
                columns = slice(start, start := start + k.shape[1])
                scores = grad_scores[..., columns]
                grad_k, grad_v, grad_bias = grads[3 * number : 3 * number + 3]
                if grad_k is not None:
                    grad_k[groups].baddbmm_(scores.transpose(1, 2), q[run], alpha=scale)
                if grad_v is not None:
                    grad_v[groups].baddbmm_(used[..., columns].transpose(1, 2), grad_out)
                if grad_bias is not None:
                    grad_bias[groups] += scores.sum(1, keepdim=True)
            grad_q[run] = torch.bmm(grad_scores, keys)
        return grad_q.mul_(scale), None, None, *grads


BlockRun = tuple[slice, slice]  # of groups and of their queries


def block_runs(q: Tensor, reads: Sequence[KeysValuesBias]) -> Iterator[BlockRun]:
    """Several groups, or parts of one, whose weights have at most RUN_ENTRIES entries."""
    groups, rows, _ = q.shape
    width = sum(k.shape[1] for k, _, _ in reads)
    some = min(rows, max(1, RUN_ENTRIES // width))
    groups_per_run = max(1, RUN_ENTRIES // (some * width))
    for group in range(0, groups, groups_per_run):
        for row in range(0, rows, some):
            yield slice(group, group + groups_per_run), slice(row, row + some)


def weights_of_run(q: Tensor, reads: Sequence[KeysValuesBias], run: BlockRun, keys: Tensor) -> Tensor:
    groups, rows = run
    queries = q[run] * q.shape[-1] ** -0.5
    weights = SCRATCH.take("weights", (*queries.shape[:2], keys.shape[1]), q)
    torch.bmm(queries, keys.transpose(1, 2), out=weights)
    start = 0
    for k, _, bias in reads:
        columns = slice(start, start := start + k.shape[1])
        if bias is not None:
            bias = bias[groups] if len(bias) == len(q) else bias
            weights[..., columns].add_(bias[:, rows] if bias.shape[1] > 1 else bias)
    return torch.softmax(weights, -1, out=weights)


def joined(name: str, parts: list[Tensor], run: BlockRun) -> Tensor:
    """Concatenate the rows of all reads: one large product is faster than two into parts."""
    if len(parts) == 1:
        return parts[0][run[0]]
    rows = [part[run[0]] for part in parts]
    shape = (len(rows[0]), sum(part.shape[1] for part in rows), rows[0].shape[2])
    return torch.cat(rows, 1, out=SCRATCH.take(name, shape, rows[0]))


def as_reads(tensors: Sequence[Tensor | None]) -> list[KeysValuesBias]:
    return [tuple(tensors[start : start + 3]) for start in range(0, len(tensors), 3)]  # type: ignore[misc]
