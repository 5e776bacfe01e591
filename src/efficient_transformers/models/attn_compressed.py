"""Memory-compressed attention: a convolution of keys and values, and causal attention to whole segments."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .attn_dense import softmax_attention
from .attn_sinkhorn import in_blocks
from .ops_tracing import first_positions, is_traced


def compress(x: Tensor, weight: Tensor, factor: int, real: Tensor | None = None) -> Tensor:
    """Convolve keys or values, (b, h, n, d) -> (b, h, s, d); `weight` (h, κ, d, d), `real` tokens (b or 1, s, f)."""
    blocks = in_blocks(x, factor)  # (b, h, s, f, d)
    blocks = (blocks if real is None else blocks * real[:, None, ..., None]).flatten(3)
    reach = -(-weight.shape[1] // factor)  # segments that a kernel touches
    if reach > 1:
        before = [F.pad(blocks, (0, 0, back, 0))[:, :, : blocks.shape[2]] for back in range(reach - 1, 0, -1)]
        blocks = torch.cat([*before, blocks], -1)
    weight = F.pad(weight, (0, 0, 0, 0, reach * factor - weight.shape[1], 0))
    return blocks @ weight.flatten(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, factor: int, dropout: float) -> Tensor:
    """Output of queries (b, h, n, d) over the segments (b, h, s, d) that end at or before them; zeros without one.

    Queries whose positions are congruent modulo `factor` attend to one more segment each, which is ordinary causal
    attention. The paper does not define the output before the end of the first segment; here it is zero.
    """
    batch, heads, length, dim = q.shape
    count, skipped = k.shape[2], factor - 1
    rows = q.transpose(1, 2)  # (b, n, h, d), as it lies in memory
    place = torch.arange(count * factor, device=q.device)
    if is_traced() or length < factor:
        rows = rows.index_select(1, (place + skipped).clamp(max=length - 1))
    else:
        rows = F.pad(rows, (0, 0, 0, 0, -skipped, count * factor - length + skipped))
    turns = rows.reshape(batch, count, factor * heads, dim).transpose(1, 2)
    keys, values = (x.repeat(1, factor, 1, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(turns, keys, values, is_causal=True, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(batch, count * factor, heads, dim).transpose(1, 2)
    return first_positions(F.pad(out, (0, 0, skipped, 0)), length, 2)


def compressed_weights(
    q: Tensor, k: Tensor, v: Tensor, factor: int, causal: bool, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of queries (b, h, n, d) over all tokens, from those over the segments `k` and `v` (b, h, s, d).

    `real` (b, n) is True at tokens that are not padding; the weight of a segment is divided equally among them. Returns
    the weights (b, h, n, n), and the (n, s) matrix that adds them up to the weights of the segments.
    """
    position, segment = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    belongs = position[:, None] // factor == segment  # (n, s)
    members = belongs & real[..., None]  # (b, n, s)
    count = members.sum(1)  # real tokens of each segment, (b, s)
    allowed = (count > 0)[:, None, None] & real[:, None, :, None]
    if causal:
        allowed = allowed & (segment < (position[:, None] + 1) // factor)
    _, of_segments = softmax_attention(q, k, v, allowed)
    share = members.to(of_segments.dtype) / count.clamp(min=1)[:, None]
    return of_segments @ share.transpose(1, 2)[:, None], belongs.to(v.dtype)
