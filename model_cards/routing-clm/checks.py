"""Argument checks whose messages name the value, the rule and the way out."""

from collections.abc import Sized


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
