"""Real tokens to the left, padding to the right, and back.

Mixers that count blocks or own per-position parameters cannot see past padding in front of or between the tokens. So
the backbone packs each row once on the way in and undoes it on the way out: a mixer only ever meets right padding.
"""

import torch
from torch import Tensor


def packing_order(keep: Tensor) -> Tensor:
    """Positions of the real tokens of each row, in order, then of the padding: (b, n) bool -> (b, n) int64."""
    # counted, not sorted: it is linear, and ONNX has no stable sort
    real, padding = keep.long(), (~keep).long()
    place = torch.where(keep, real.cumsum(1), real.sum(1, keepdim=True) + padding.cumsum(1)) - 1
    return inverse(place)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, row by row: (b, n) -> (b, n)."""
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def pack(x: Tensor, order: Tensor) -> Tensor:
    """Reorder axis 1 of `x` (b, n, …) by `order` (b, n)."""
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))


def first_positions(x: Tensor, length: int, *axes: int) -> Tensor:
    """The first `length` entries of `x` along each of `axes`."""
    for axis in axes:
        if torch.compiler.is_compiling():  # a slice would ask how a traced length compares
            x = x.index_select(axis, torch.arange(length, device=x.device))
        elif length < x.shape[axis]:  # of all of them a slice would have a gradient filled and copied for nothing
            x = x.narrow(axis, 0, length)
    return x


def unpack(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return pack(x, inverse(order))
