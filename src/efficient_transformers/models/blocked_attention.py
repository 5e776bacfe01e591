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
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Tensor:
    """`sparse_attention` as a few batched products over blocks and their neighbours, linear in n, for autograd.

    `q`, `k`, `v` (b, h, n, d); `keep` (b, n) is True at real tokens, padding on the right; `global_mask` (b, n) is True
    at further global tokens; `random_blocks` and `global_rows` as there. Returns (b, h, n, d), zeros at padding.
    """
    batch, num_heads, length, _ = q.shape
    if pattern.is_full:
        return masked_attention(q, k, v, pattern, keep, dropout)
    step, reach, size = pattern.dilation, pattern.window, pattern.block_size
    per_class = (length + step - 1) // step
    if reach is None:
        size, reach = per_class, 0
    elif pattern.num_random_blocks and not pattern.in_blocks:
        reach = -(-reach // size)
    elif not pattern.in_blocks:
        # a length that is traced as a symbol must not be compared
        size = max(min(reach, per_class) if isinstance(length, int) else reach, 16)
        reach = min(reach, 1)
    count = (per_class + size - 1) // size
    neighbours = range(1 + reach * (1 if pattern.causal else 2))

    def fold(x: Tensor) -> Tensor:
        """(…, n, d) -> (…, residue classes, blocks, size, d), zeros behind the end."""
        x = F.pad(x, (0, 0, 0, step * count * size - length))
        return x.unflatten(-2, (count, size, step)).movedim(-2, -4)

    def with_neighbours(x: Tensor) -> Tensor:
        """(…, blocks, size, d) -> (…, blocks, keys, d)."""
        x = F.pad(x, (0, 0, 0, 0, reach, 0 if pattern.causal else reach))
        # concatenated rather than unfolded: torch.compile gave wrong gradients for overlapping windows
        return torch.cat([x[..., i : i + count, :, :] for i in neighbours], -2)

    position = torch.arange(length, device=q.device)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if keep is None else keep
    i = fold(position[:, None])  # (s, c, size, 1)
    j = with_neighbours(fold(position[:, None])).transpose(-1, -2)  # (s, c, 1, keys)
    there = with_neighbours(fold(real[..., None].to(q.dtype))).transpose(-1, -2) > 0  # (b, s, c, 1, keys)
    queries = fold(q * q.shape[-1] ** -0.5)  # (b, h, s, c, size, d)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def score(keys: Tensor, allowed: Tensor) -> Tensor:
        """q·k where allowed, (b, h, s, c, size, keys); `allowed` broadcasts to that."""
        return (queries @ keys.transpose(-1, -2)).to(wide).masked_fill(~allowed, torch.finfo(wide).min)

    near = there & pattern.in_window(i, j)
    scores = [score(with_neighbours(fold(k)), (near & (j <= i) if pattern.causal else near)[:, None])]
    values = [with_neighbours(fold(v))]
    tokens, present = global_positions(pattern, real, global_mask)  # (b, g)
    token_q = token_k = token_v = q
    if tokens is not None:
        index = tokens[:, None, :, None]
        token_q, token_k, token_v = (x.gather(2, index.expand(batch, num_heads, -1, x.shape[3])) for x in (q, k, v))
        t = tokens[:, None, None, None]  # (b, 1, 1, 1, g)
        outside = present[:, None, None, None] & ~pattern.in_window(i, t)
        outside = outside & (t <= i) if pattern.causal else outside
        scores.append(score(token_k[:, :, None, None], outside[:, None]))
        values.append(token_v[:, :, None, None])
    if pattern.num_random_blocks:
        if random_blocks is None:
            table = pattern.random_blocks(num_heads, count, (real.sum(1) + size - 1) // size)  # (b, h, c, r)
            free = real if tokens is None else real & ~marks_of(tokens, present, real)
        else:  # as they stand, whatever else reads them; behind the end of a table nothing is drawn
            table = F.pad(random_blocks[:, :count], (0, 0, 0, count), value=-1)[None, :, :count].to(q.device)
            free = real
        blocks = table.expand(batch, -1, -1, -1).flatten(2).clamp(min=0)[..., None, None]  # (b, h, c·r, 1, 1)

        def drawn(x: Tensor) -> Tensor:
            """(b, h, n, d) -> (b, h, 1, c, r·size, d)."""
            x = fold(x)[:, :, 0]
            x = x.expand(-1, num_heads, -1, -1, -1).gather(2, blocks.expand(-1, -1, -1, size, x.shape[-1]))
            return x.unflatten(2, (count, -1)).flatten(3, 4)[:, :, None]

        allowed = drawn(free[:, None, :, None].expand(batch, -1, -1, -1).to(q.dtype)).transpose(-1, -2) > 0
        allowed = allowed & (table >= 0).repeat_interleave(size, -1)[:, :, None, :, None]
        scores.append(score(drawn(k), allowed))
        values.append(drawn(v))
    weights = F.dropout(torch.cat(scores, -1).softmax(-1).to(v.dtype), dropout)
    parts = weights.split([score.shape[-1] for score in scores], -1)
    mixed = sum((part @ value for part, value in zip(parts[1:], values[1:], strict=True)), parts[0] @ values[0])
    out = mixed.movedim(-4, -2).flatten(-4, -2)[:, :, :length]

    if tokens is not None and global_rows:
        reads = real[:, None, None] & present[:, None, :, None]
        if pattern.causal:
            reads = reads & (position <= tokens[..., None])[:, None]
        rows = F.scaled_dot_product_attention(token_q, k, v, attn_mask=reads, dropout_p=dropout)
        out = put_rows(out, rows, tokens, present)
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)


def put_rows(x: Tensor, rows: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
    """`x` (b, h, n, d) with `rows` (b, h, g, d) at positions `tokens` (b, g) that are `present`."""
    length = x.shape[2]
    # tokens that are not there, where a row has fewer, are written behind the end and cut off
    target = torch.where(present, tokens, length)[:, None, :, None].expand_as(rows)
    return F.pad(x, (0, 0, 0, 1)).scatter(2, target, rows.to(x.dtype))[:, :, :length]


def marks_of(tokens: Tensor, present: Tensor, real: Tensor) -> Tensor:
    """(b, n) True at the positions `tokens` (b, g) that are `present`."""
    return torch.zeros_like(real).expand(len(tokens), -1).scatter(1, tokens, present.expand_as(tokens))


def global_positions(
    pattern: AttentionPattern, real: Tensor, global_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Global tokens of each row, (b, g), and which of them are there; None if the pattern has none."""
    batch, length = real.shape if global_mask is None else global_mask.shape
    own = torch.tensor(pattern.global_tokens, dtype=torch.long, device=real.device)
    if global_mask is not None:
        position = torch.arange(length, device=real.device)
        marked = real & (global_mask | pattern.is_global(position, real.sum(1, keepdim=True)))
        most = int(marked.sum(1).max())
        there, tokens = marked.int().topk(most, dim=1, sorted=True)
        return (tokens if most else None), there.bool()
    tokens = own.expand(batch, -1)
    if pattern.global_ends:
        size, offset = pattern.block_size, torch.arange(pattern.block_size, device=real.device)
        last = (real.sum(1, keepdim=True) - 1).clamp(min=0) // size * size
        own = own[own >= size]
        inner = torch.where(own < last, own, length)
        tokens = torch.cat([inner, offset.expand(batch, -1), torch.where(last > 0, last + offset, length)], 1)
    present = tokens < length
    tokens = tokens.clamp(max=length - 1)
    return (tokens if tokens.shape[1] else None), present & real.expand(batch, -1).gather(1, tokens)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, keep: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Full attention, causal or not, by torch's kernel; shapes as `blocked_attention`."""
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=pattern.causal)
    allowed = keep[:, None, None]
    if pattern.causal:
        allowed = allowed & pattern.dense(q.shape[2], device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return out.masked_fill(~keep[:, None, :, None], 0)
