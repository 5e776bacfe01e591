"""Tables of positions made longer or shorter, and a whole model with them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stretch = Literal["tile", "interpolate"]


def stretch_positions(table: Tensor, length: int, how: Stretch, axis: int = 0) -> Tensor:
    """`table` with `length` positions along `axis`: tiled or interpolated if longer, cut if shorter; a copy.

    Interpolated row i is at i·(n-1)/(length-1) of the old table, so both ends keep their rows. What has no values
    in between, as a table of numbers of blocks, is always tiled.
    """
    old = table.shape[axis]
    if length <= old:
        return table.narrow(axis, 0, length).clone()
    if how == "tile" or not table.is_floating_point():
        index = torch.arange(length, device=table.device) % old
        return table.index_select(axis, index)
    rows = table.movedim(axis, -1)
    wide = rows.to(torch.promote_types(table.dtype, torch.float32)).reshape(1, -1, old)
    long = F.interpolate(wide, size=length, mode="linear", align_corners=True)
    return long.view(*rows.shape[:-1], length).movedim(-1, axis).to(table.dtype).contiguous()


def resize_table(module: nn.Module, name: str, lengths: Mapping[int, int], summed: Sequence[int], how: Stretch) -> None:
    """Give the parameter or buffer `name` of `module` the `lengths` of some of its axes, in place.

    Along `summed` axes interpolated entries are divided by what they have grown by, so that sums keep their size.
    """
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, last)
    new = old.detach()
    for axis, length in lengths.items():
        growth = length / new.shape[axis]
        new = stretch_positions(new, length, how, axis)
        if how == "interpolate" and axis in summed and growth > 1:
            new /= growth
    setattr(owner, last, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    if isinstance(owner, nn.Embedding):
        owner.num_embeddings = len(new)
