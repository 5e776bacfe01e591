"""Compute the matrices by which a model mixes positions, while it runs on an input."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .mixer_maps import KINDS, Matrix
from .models.base_configuration import EtConfig, PatternConfig
from .models.base_mixer import SequenceInfo
from .registry import variant_of

__all__ = ["KINDS", "Matrix", "read_matrices"]


@torch.no_grad()
def read_matrices(model: PreTrainedModel, input_ids: Tensor, layer: int | None = None) -> list[Matrix]:
    """The matrices of a bare model on one input (1, n), by head; heads with the same pattern share one matrix.

    layer: None selects the first layer and all layers with patterns that no earlier layer has. Weights are computed in
    float64, so that a weight is zero only if the formula makes it zero. External tokens come first, as in the model.
    Raises ValueError if the model does not have the layer.
    """
    config: EtConfig = model.config  # type: ignore[reportAssignmentType]
    layers = different_layers(config) if layer is None else [layer]
    if not all(0 <= number < config.num_hidden_layers for number in layers) or not layers:
        raise ValueError(f"layer ({layer}) must lie between 0 and num_hidden_layers ({config.num_hidden_layers}) - 1.")
    matrices_of = variant_of(config).matrices
    seen: dict[int, tuple[Tensor, SequenceInfo]] = {}
    mixers: list[Any] = [block.mixer for block in model.layers]  # type: ignore[union-attr]
    hooks = [
        mixers[number].register_forward_pre_hook(lambda _, given, number=number: seen.__setitem__(number, given))
        for number in layers
    ]
    dtype, training = model.dtype, model.training
    model.eval().double()
    try:
        # without a cache, which would still hold this pass when the mixer is called again for its weights
        model(input_ids.to(model.device), use_cache=False)
        found = []
        for number in layers:
            hidden, sequence = seen[number]
            parts = list(matrices_of(mixers[number], hidden, replace(sequence, output_attentions=True)))
            where = f"layer {number}, " if len(layers) > 1 else ""
            found += [
                replace(part, name=where + part.name, values=part.values.detach().double().cpu()) for part in parts
            ]
    finally:
        for hook in hooks:
            hook.remove()
        model.to(dtype).train(training)  # type: ignore[reportArgumentType] — typed as if it were a function
    return found


def different_layers(config: EtConfig) -> list[int]:
    """The first layer, and all layers with patterns that no earlier layer has; seeds are ignored."""
    if not isinstance(config, PatternConfig):
        return [0]
    first: dict[tuple, int] = {}
    for layer in range(config.num_hidden_layers):
        first.setdefault(tuple(replace(pattern, seed=0) for pattern in config.attention_patterns(layer)), layer)
    return list(first.values())
