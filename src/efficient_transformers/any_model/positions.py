"""Lengthen the learned absolute position table of any transformers model."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.base_resizing import Stretch, stretch_positions


def resize_positions(model: PreTrainedModel, length: int, how: Stretch = "tile") -> None:
    """Give a model learned positions for `length` tokens, in place and in its config.

    The tables are found by building the model without data from a longer config and comparing shapes, so any
    architecture is supported. Rows before the first position (two in RoBERTa and OPT) keep their place and values.

    `how`: "tile" repeats the table, as in the construction of Longformer from RoBERTa (Beltagy et al. 2020, section 5);
    "interpolate" stretches it linearly. A shorter `length` truncates it.
    Raises ValueError if the model has no such table: rotary, relative and sinusoidal positions are not learned.
    """
    if length < 1:
        raise ValueError(f"length ({length}) must be at least 1 token.")
    config = model.config.get_text_config()
    before = getattr(config, "max_position_embeddings", None)
    tables, buffers = sized_by_positions(model) if isinstance(before, int) else ({}, {})
    if not tables:
        raise ValueError(
            f"{type(model).__name__} has no learned position table, so there is nothing to resize: a model with rotary "
            "or relative positions accepts longer inputs unchanged; see max_position_embeddings and rope_parameters in "
            "its config."
        )
    grown, new = set(), {}
    for name, axes in tables.items():
        owner, leaf = owner_of(model, name)
        if "sinusoid" in type(owner).__name__.lower():
            raise ValueError(
                f"{name} holds fixed sinusoids: load the model with a larger max_position_embeddings ({before})."
            )
        old, axis = getattr(owner, leaf).detach(), axes[0]
        offset = first_row(model, name, buffers)
        rows = stretch_positions(old.narrow(axis, offset, old.shape[axis] - offset), length, how, axis)
        new[name] = torch.cat([old.narrow(axis, 0, offset), rows], axis)
        grown.add(new[name].shape[axis] - old.shape[axis])
    if len(grown) > 1:
        raise ValueError(f"{', '.join(tables)} have different numbers of positions, so they cannot get one length.")
    more = grown.pop()
    new |= {name: continued(model.get_buffer(name), axes, more, name) for name, axes in buffers.items()}
    for name, values in new.items():
        owner, leaf = owner_of(model, name)
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values)
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = len(values)
    config.max_position_embeddings = before + more


Axes = dict[str, list[int]]


def sized_by_positions(model: PreTrainedModel) -> tuple[Axes, Axes]:
    """Parameters and buffers whose size depends on `max_position_embeddings`, with the axes that do."""
    shapes = []
    for more in (0, 1):
        config = deepcopy(model.config)
        config.get_text_config().max_position_embeddings += more
        with torch.device("meta"):
            other = type(model)(config)
        shapes.append([{n: x.shape for n, x in found} for found in (other.named_parameters(), other.named_buffers())])
    found: list[Axes] = []
    for short, long in zip(*shapes, strict=True):
        axes = {name: [i for i, size in enumerate(short[name]) if size != long[name][i]] for name in short}
        found.append({name: changed for name, changed in axes.items() if changed})
    return found[0], found[1]


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def first_row(model: nn.Module, table: str, buffers: Axes) -> int:
    """Row of a table that belongs to the first token."""
    owner, _ = owner_of(model, table)
    around = table.rpartition(".")[0].rpartition(".")[0]
    if isinstance(getattr(owner, "offset", None), int):  # BART, OPT
        return owner.offset  # type: ignore[reportReturnType]
    padding = getattr(owner, "padding_idx", None)
    if padding is not None and (type(owner) is not nn.Embedding or hasattr(model.get_submodule(around), "padding_idx")):
        return padding + 1  # type: ignore[reportOperatorIssue] — RoBERTa counts from the row after the padding row
    numbers = [name for name in buffers if name == f"{around}.position_ids".lstrip(".")]
    return int(model.get_buffer(numbers[0]).min()) if numbers else 0


def continued(buffer: Tensor, axes: list[int], more: int, name: str) -> Tensor:
    """Extend a buffer to `more` positions: evenly spaced numbers, or a matrix whose entries depend on the distance.

    Raises ValueError for any other buffer.
    """
    if more <= 0:
        for axis in axes:
            buffer = buffer.narrow(axis, 0, buffer.shape[axis] + more)
        return buffer.clone()
    if len(axes) == 1:
        (axis,) = axes
        steps = buffer.diff(dim=axis).movedim(axis, -1)
        if bool((steps == steps[..., :1]).all()):
            last, step = buffer.narrow(axis, -1, 1), steps[..., :1].movedim(-1, axis)
            count = torch.arange(1, more + 1, device=buffer.device, dtype=buffer.dtype)
            return torch.cat(
                [buffer, last + step * count.view([-1 if i == axis else 1 for i in range(buffer.dim())])], axis
            )
    elif axes == [buffer.dim() - 2, buffer.dim() - 1] and buffer.shape[-1] == buffer.shape[-2]:
        size = buffer.shape[-1]
        of_distance = torch.cat([buffer[..., 0, :].flip(-1), buffer[..., 1:, 0]], -1)  # from size - 1 after to before
        for length in (size, size + more):
            index = torch.arange(length, device=buffer.device)
            distance = (index[:, None] - index).clamp(1 - size, size - 1) + size - 1
            matrix = of_distance[..., distance]
            if length == size and not matrix.equal(buffer):
                break
        else:
            return matrix
    raise ValueError(f"the buffer {name} depends on the number of positions in a way that is not supported.")
