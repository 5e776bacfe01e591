"""Argument checks whose messages name the value, the rule and the way out."""

from collections.abc import Sized

import torch
from torch import Tensor

from .ops_tracing import is_traced


def check_divisible(name: str, value: int, by_name: str, by: int, remedy: str) -> None:
    """Raise ValueError unless `value` is a multiple of `by`."""
    if value % by:
        raise ValueError(f"{name} ({value}) must be a multiple of {by_name} ({by}): {remedy}.")


def check_at_least(name: str, value: int | float, minimum: int | float, remedy: str) -> None:
    """Raise ValueError if `value` lies below `minimum`."""
    if value < minimum:
        raise ValueError(f"{name} ({value}) must be at least {minimum}: {remedy}.")


def check_entries(name: str, value: Sized, by_name: str, by: int, remedy: str) -> None:
    """Raise ValueError unless `value` has as many entries as `by` says."""
    if len(value) != by:
        raise ValueError(f"{name} has {len(value)} entries and {by_name} is {by}: {remedy}.")


def check_length(length: int, maximum: int, model: str) -> None:
    """Raise ValueError if a sequence is longer than the model was built for."""
    if length > maximum:
        raise ValueError(
            f"{model} was built for {maximum} positions and got {length}: "
            "set max_position_embeddings higher before training, or truncate the input."
        )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless `shape` equals `expected`; `axes` names them for the reader."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} must have shape ({axes}) = {expected}, got {tuple(shape)}.")


def as_mask(name: str, mask: Tensor, one: str, zero: str, remedy: str) -> Tensor:
    """`mask` (b, n) as bool. Bool, integers and floats are accepted as long as every value is 0 or 1.

    `one` and `zero` say what the two values mean. Raises ValueError for any other value (traced code cannot check it),
    for other than two axes, and for a float mask of zeros alone, which may be an additive mask.
    """
    if mask.dim() != 2:
        raise ValueError(f"{name} must have two axes, batch and length, got shape {tuple(mask.shape)}: {remedy}.")
    if mask.dtype == torch.bool or is_traced():
        return mask.bool()
    wrong = (mask != 0) & (mask != 1)  # true of NaN as well
    if bool(wrong.any()):
        raise ValueError(f"{name} must be 1 at {one} and 0 at {zero}, got {mask[wrong][0].item():g}: {remedy}.")
    if mask.is_floating_point() and not bool(mask.any()):
        raise ValueError(
            f"{name} is all zeros in {mask.dtype}: an additive mask without padding looks like this, too. Leave it out "
            f"if there is no {zero}; if there is nothing else, give it as bool."
        )
    return mask.bool()


def check_per_token(name: str, ids: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `ids` are integers of shape (batch or 1, length): other shapes would be broadcast."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} must be integers, got {ids.dtype}: convert it with .long().")
    if is_traced():
        return  # a comparison of symbolic sizes would tie a graph to them
    if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
        raise ValueError(f"{name} must have shape (batch or 1, length) = ({batch}, {length}), got {tuple(ids.shape)}.")
