"""Softmax attention over a drawn pattern as a handful of batched products, without data-dependent control flow.

For tracing (torch.compile, torch.export) and for devices on which launching is dear; linear in n.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .patterns import AttentionPattern


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`sparse_attention` as a few batched products over blocks and their neighbours, linear in n, for autograd.

    `q`, `k`, `v` (b, h, n, d); `keep` (b, n) is True at real tokens, padding on the right; `global_mask` (b, n) is True
    at further global tokens. Returns (b, h, n, d), zeros at padding. Random blocks are drawn for every row's own
    length, which is data: those heads take the dense mask here.
    """
    length = q.shape[2]
    if pattern.is_full or pattern.num_random_blocks:
        return masked_attention(q, k, v, pattern, keep, global_mask, dropout)
    step = pattern.dilation
    per_class = -(-length // step)
    window = per_class if pattern.window is None else min(pattern.window, per_class)
    size = per_class if pattern.window is None else max(window, 16)
    reach = 0 if pattern.window in (0, None) else 1  # blocks to each side
    count = -(-per_class // size)

    def fold(x: Tensor) -> Tensor:
        """(…, n, d) -> (…, residue classes, blocks, size, d), zeros behind the end."""
        x = F.pad(x, (0, 0, 0, step * count * size - length))
        return x.unflatten(-2, (count, size, step)).movedim(-2, -4)

    def with_neighbours(x: Tensor) -> Tensor:
        """(…, blocks, size, d) -> (…, blocks, keys, d)."""
        x = F.pad(x, (0, 0, 0, 0, reach, 0 if pattern.causal else reach))
        # concatenated rather than unfolded: torch.compile gave wrong gradients for overlapping windows
        return torch.cat([x[..., i : i + count, :, :] for i in range(x.shape[-3] - count + 1)], -2)

    position = torch.arange(length, device=q.device)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if keep is None else keep
    i = fold(position[:, None])  # (s, c, size, 1)
    j = with_neighbours(fold(position[:, None])).transpose(-1, -2)  # (s, c, 1, keys)
    there = with_neighbours(fold(real[..., None].to(q.dtype))).transpose(-1, -2) > 0  # (b, s, c, 1, keys)
    queries = fold(q * q.shape[-1] ** -0.5)  # (b, h, s, c, size, d)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def score(keys: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """q·k where allowed, (b, h, s, c, size, keys)."""
        allowed = allowed & (positions <= i) if pattern.causal else allowed
        return (queries @ keys.transpose(-1, -2)).to(wide).masked_fill(~allowed[:, None], torch.finfo(wide).min)

    scores = [score(with_neighbours(fold(k)), j, there & pattern.in_window(i, j))]
    tokens, present = global_positions(pattern, real, global_mask)  # (b, g)
    if tokens is not None:
        index = tokens[:, None, :, None]
        token_q, token_k, token_v = (x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])) for x in (q, k, v))
        t = tokens[:, None, None, None]  # (b, 1, 1, 1, g)
        outside = present[:, None, None, None] & ~pattern.in_window(i, t)
        scores.append(score(token_k[:, :, None, None], t, outside))
    weights = F.dropout(torch.cat(scores, -1).softmax(-1).to(v.dtype), dropout)
    weights = weights.split([score.shape[-1] for score in scores], -1)
    mixed = weights[0] @ with_neighbours(fold(v))
    if tokens is not None:
        mixed = mixed + weights[1] @ token_v[:, :, None, None]
    out = mixed.movedim(-4, -2).flatten(-4, -2)[:, :, :length]

    if tokens is not None:
        reads = real[:, None, None] & present[:, None, :, None]
        if pattern.causal:
            reads = reads & (position <= tokens[..., None])[:, None]
        rows = F.scaled_dot_product_attention(token_q, k, v, attn_mask=reads, dropout_p=dropout)
        # tokens that are not there, where a row has fewer, are written behind the end and cut off
        target = torch.where(present, tokens, length)[:, None, :, None].expand_as(rows)
        out = F.pad(out, (0, 0, 0, 1)).scatter(2, target, rows)[:, :, :length]
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)


def global_positions(
    pattern: AttentionPattern, real: Tensor, global_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Global tokens of each row, (b, g), and which of them are there; None if the pattern has none."""
    batch, length = real.shape if global_mask is None else global_mask.shape
    own = torch.tensor([t for t in pattern.global_tokens if t < length], dtype=torch.long, device=real.device)
    if global_mask is None:
        tokens = own.expand(batch, -1)
        return (tokens if len(own) else None), real.gather(1, tokens)
    marked = global_mask.clone()
    marked[:, own] = True
    marked &= real
    most = int(marked.sum(1).max())
    there, tokens = marked.int().topk(most, dim=1, sorted=True)
    return (tokens if most else None), there.bool()


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    keep: Tensor | None = None,
    global_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Torch's kernel under the dense mask of the pattern; shapes as `blocked_attention`."""
    length = q.shape[2]
    if keep is None and global_mask is None and pattern.is_full:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=pattern.causal)
    heads = q.shape[1] if pattern.num_random_blocks else 1
    if pattern.is_full and not pattern.causal:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)  # (n, n) would say no more
    elif pattern.num_random_blocks and keep is not None:
        rows = [F.pad(pattern.dense(int(r), heads, q.device), (0, length - int(r)) * 2) for r in keep.sum(1)]
        allowed = torch.stack(rows)
    else:
        allowed = pattern.dense(length, heads, q.device)[None]
    if global_mask is not None:
        allowed = allowed | global_mask[:, None, :, None] | global_mask[:, None, None, :]
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed & keep[:, None, None], dropout_p=dropout)
    return out.masked_fill(~keep[:, None, :, None], 0)
