"""Softmax attention over a drawn pattern as a handful of batched products, without data-dependent control flow.

For tracing (torch.compile, torch.export) and for devices on which launching is dear; linear in n.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_patterns import AttentionPattern
from .ops_tracing import count_blocks, is_exported, is_traced

TILE = 64  # queries of a tile where blocks do not say otherwise; it reads so many keys and the window on either side


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
    step, reach, size = pattern.dilation, pattern.reach, pattern.block_size
    per_class = (length + step - 1) // step  # tokens of a residue class modulo the dilation
    if reach is None:  # a class is one tile
        size, reach = count_blocks(length, step), 0
    elif not pattern.in_blocks and not pattern.num_random_blocks:
        size = TILE
    count = 1 if pattern.reach is None else count_blocks(per_class, size)
    device, last = q.device, length - 1

    def tiles_of(x: Tensor, index: Tensor) -> Tensor:
        """(b, …, n, d) -> (b, …, s, c, m, d) at `index` (s, c, m), clamped to the ends; those have to be masked."""
        # selected by index, where folding a padded sequence would make a traced length a multiple of the tile
        return x.index_select(-2, index.clamp(0, last).flatten()).unflatten(-2, index.shape)

    within = torch.arange(count, device=device)[:, None] * size  # (c, 1), start of each tile in its class
    residue = torch.arange(step, device=device)[:, None, None]
    around = torch.arange(-reach, size + (0 if pattern.causal else reach), device=device)
    queries_at = residue + step * (within + torch.arange(size, device=device))  # (s, c, size)
    keys_at = residue + step * (within + around)  # (s, c, keys)
    i, j = queries_at[..., None], keys_at[..., None, :]
    real = torch.ones(1, length, dtype=torch.bool, device=device) if keep is None else keep
    there = tiles_of(real[..., None], keys_at)[..., 0] & (keys_at >= 0) & (keys_at < length)  # (b, s, c, keys)
    queries = tiles_of(q * q.shape[-1] ** -0.5, queries_at)  # (b, h, s, c, size, d)
    wide = torch.promote_types(q.dtype, torch.float32)

    def score(keys: Tensor, allowed: Tensor) -> Tensor:
        """q·k where allowed, (b, h, s, c, size, keys); `allowed` broadcasts to that."""
        return (queries @ keys.transpose(-1, -2)).to(wide).masked_fill(~allowed, torch.finfo(wide).min)

    near = there[..., None, :] & pattern.in_window(i, j)
    scores = [score(tiles_of(k, keys_at), (near & (j <= i) if pattern.causal else near)[:, None])]
    values = [tiles_of(v, keys_at)]
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
            row = torch.arange(count, device=device)
            ends = row[:, None] >= random_blocks.shape[1]
            table = random_blocks.to(device).index_select(1, row.clamp(max=random_blocks.shape[1] - 1))
            table, free = table.masked_fill(ends, -1)[None], real
        drawn_at = (table[..., None] * size + torch.arange(size, device=device)).flatten(-2)  # (b, h, c, r·size)
        at = drawn_at.clamp(0, last).expand(batch, -1, -1, -1)
        row, head = (torch.arange(number, device=device) for number in (batch, num_heads))

        def drawn(x: Tensor) -> Tensor:
            """(b, h, n, d) -> (b, h, 1, c, r·size, d)."""
            x = x.expand(batch, num_heads, -1, -1)
            if is_exported():  # as below: not folded
                return x[row[:, None, None, None], head[:, None, None], at][:, :, None]
            x = x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
            return x.unflatten(2, (-1, drawn_at.shape[-1]))[:, :, None]

        allowed = drawn(free[:, None, :, None])[..., 0] & ((drawn_at >= 0) & (drawn_at < length))[:, :, None]
        scores.append(score(drawn(k), allowed[..., None, :]))
        values.append(drawn(v))
    weights = F.dropout(torch.cat(scores, -1).softmax(-1).to(v.dtype), dropout)
    parts = weights.split([score.shape[-1] for score in scores], -1)
    mixed = sum((part @ value for part, value in zip(parts[1:], values[1:], strict=True)), parts[0] @ values[0])
    position = torch.arange(length, device=device)
    if is_exported():  # to fold tiles of a symbolic number would take a proof about divisions
        place = position // step
        tile, slot = (torch.zeros_like(place), place) if pattern.reach is None else (place // size, place % size)
        out = mixed[:, :, position % step, tile, slot]
    else:
        out = mixed.movedim(2, 4).flatten(2, 4).index_select(2, position)

    if tokens is not None and global_rows:
        reads = real[:, None, None] & present[:, None, :, None]
        if pattern.causal:
            reads = reads & (position <= tokens[..., None])[:, None]
        rows = F.scaled_dot_product_attention(token_q, k, v, attn_mask=reads, dropout_p=dropout)
        out = put_rows(out, rows, tokens, present)
    return out if keep is None else out.masked_fill(~keep[:, None, :, None], 0)


def put_rows(x: Tensor, rows: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
    """`x` (b, h, n, d) with `rows` (b, h, g, d) at positions `tokens` (b, g) that are `present`."""
    if x.device.type == "cpu" and not is_traced():
        # writes just what is there; elsewhere `nonzero` would wait for the device, and no trace knows how much it finds
        row, number = present.expand(len(x), -1).nonzero(as_tuple=True)
        values = rows[row, :, number].to(x.dtype)
        return x.transpose(1, 2).index_put((row, tokens.expand(len(x), -1)[row, number]), values).transpose(1, 2)
    length = x.shape[2]
    # tokens that are not there, where a row has fewer, are written behind the end and cut off
    target = torch.where(present, tokens, length)[:, None, :, None].expand_as(rows)
    return F.pad(x, (0, 0, 0, 1)).scatter(2, target, rows.to(x.dtype))[:, :, :length]


def marks_of(tokens: Tensor, present: Tensor, real: Tensor) -> Tensor:
    """(b, n) True at the positions `tokens` (b, g) that are `present`."""
    return torch.zeros_like(real).expand(tokens.shape[0], -1).scatter(1, tokens, present.expand_as(tokens))


def global_positions(
    pattern: AttentionPattern, real: Tensor, global_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Global tokens of each row, (b, g), and which of them are there; None if the pattern has none."""
    batch, length = real.shape if global_mask is None else global_mask.shape
    own = torch.tensor(pattern.global_tokens, dtype=torch.long, device=real.device)
    if global_mask is not None:
        position = torch.arange(length, device=real.device)
        marked = real & (global_mask | pattern.is_global(position, real.sum(1, keepdim=True)))
        # torch.jit.trace would record the number in its example as a constant: room for all instead
        most = length if torch.jit.is_tracing() else marked.sum(1).max().item()
        if torch.compiler.is_compiling():  # a number that only the data tells
            torch._check(most >= 0)
            torch._check(most <= length)
        elif not most:
            return None, marked
        there, tokens = marked.int().topk(most, dim=1, sorted=True)  # type: ignore[reportArgumentType]
        return tokens, there.bool()
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
