"""Global tokens of a batch: their positions, and the rows at these positions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_engine import choose_engine
from .ops_patterns import AttentionPattern


def rows_at(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `x` (b, h, n, d) at `tokens` (b, g): (b, h, g, d)."""
    return x.gather(2, tokens[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def put_rows(x: Tensor, rows: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
    """Replace the rows of `x` (b, h, n, d) at the `present` ones of `tokens` (b, g) by `rows` (b, h, g, d)."""
    if choose_engine(x.device) == "tiled":
        # write only the rows that exist; elsewhere `nonzero` would synchronise, and in a trace its size is unknown
        row, number = present.expand(len(x), -1).nonzero(as_tuple=True)
        values = rows[row, :, number].to(x.dtype)
        return x.transpose(1, 2).index_put((row, tokens.expand(len(x), -1)[row, number]), values).transpose(1, 2)
    length = x.shape[2]
    # a row with fewer tokens writes the absent ones after the end, which is cut off
    target = torch.where(present, tokens, length)[:, None, :, None].expand_as(rows)
    return F.pad(x, (0, 0, 0, 1)).scatter(2, target, rows.to(x.dtype))[:, :, :length]


def global_mask_of(tokens: Tensor, present: Tensor, real: Tensor) -> Tensor:
    """(b, n) True at the positions `tokens` (b, g) that are `present`."""
    return torch.zeros_like(real).expand(tokens.shape[0], -1).scatter(1, tokens, present.expand_as(tokens))


def global_positions(
    pattern: AttentionPattern, real: Tensor, global_mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Positions of each row's global tokens, (b, g), None if there are none, and which of them are present.

    `real` (b, n) is True at tokens that are not padding. A row with fewer global tokens than g has absent ones.
    """
    batch, length = real.shape if global_mask is None else global_mask.shape
    own = torch.tensor(pattern.global_tokens, dtype=torch.long, device=real.device)
    if global_mask is not None:
        position = torch.arange(length, device=real.device)
        is_global = real & (global_mask | pattern.is_global(position, real.sum(1, keepdim=True)))
        # torch.jit.trace would record the example's number as a constant: take room for all
        most = length if torch.jit.is_tracing() else is_global.sum(1).max().item()
        if torch.compiler.is_compiling():  # a data-dependent number
            torch._check(most >= 0)
            torch._check(most <= length)
        elif not most:
            return None, is_global
        there, tokens = is_global.int().topk(most, dim=1, sorted=True)  # type: ignore[reportArgumentType]
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
