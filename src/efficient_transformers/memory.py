"""Estimate the memory of a model from its config, before anything is allocated.

The estimates are rough, within a factor of two or three for the models of this package. They detect mistakes (an extra
zero), and are not meant for choosing a batch size.
"""

import dataclasses
import math
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from .registry import VARIANTS

FLOAT = 4  # bytes
ADAM = 4  # copies of a parameter in training: itself, its gradient and two moments
PROCESS = 100 * 2**20  # bytes of a worker process
MEASURED_LAYERS = 64  # models with more layers are extrapolated from one and two layers
# more layers take minutes to build, and more iterations minutes to run
MOST = {"num_hidden_layers": 10_000, "sinkhorn_iterations": 10_000}


class TooLargeError(ValueError):
    """A model, or its computation, does not fit into the memory of this machine."""


@dataclasses.dataclass
class Estimate:
    """Bytes by purpose."""

    weights: float = 0
    activations: float = 0
    workers: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.workers

    def check(self, device: torch.device | None = None, remedy: str = "") -> None:
        """Raise TooLargeError, with the estimate, if it exceeds the memory of `device` (default: the machine)."""
        limit = memory_of(device)
        if self.total > limit:
            parts = {"weights and optimizer": self.weights, "activations": self.activations, "workers": self.workers}
            found = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
            raise TooLargeError(
                f"This needs about {size(self.total)} of memory ({found}), but there are only {size(limit)}.{remedy}"
            )


def memory_of(device: torch.device | None = None) -> int:
    """Bytes of memory of a device, or of the machine."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def size(count: float) -> str:
    """Format bytes with 3 digits and a unit, e.g. `1.85 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def number(config: Any, name: str, default: float = 0) -> float:
    """A field of a config if it is a number, otherwise `default`."""
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def parameters_of(config: PreTrainedConfig) -> float:
    """Number of parameters of the body: counted for variants of this package, estimated from sizes for other models."""
    variant = VARIANTS.get(str(config.model_type).removeprefix("et_"))
    if variant is None or config.model_type != variant.model_type:
        return parameters_by_sizes(config)
    layers = int(number(config, "num_hidden_layers"))
    if layers <= MEASURED_LAYERS:
        return count(variant.model_class(), config)
    try:
        one, two = (
            count(variant.model_class(), type(config)(**{**config.to_dict(), "num_hidden_layers": n})) for n in (1, 2)
        )
    except ValueError:  # there are fields with one entry per layer
        return parameters_by_sizes(config)
    return one + (layers - 1) * (two - one)


def count(model_class: Any, config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def parameters_by_sizes(config: PreTrainedConfig) -> float:
    hidden, layers = number(config, "hidden_size"), number(config, "num_hidden_layers")
    inner = number(config, "intermediate_size", 4 * hidden)
    rows = number(config, "vocab_size") + number(config, "max_position_embeddings")
    return rows * number(config, "embedding_size", hidden) + layers * (4 * hidden**2 + 2 * hidden * inner)


def activations_of(config: PreTrainedConfig, batch: int, length: int, *, training: bool) -> float:
    """Bytes of the activations of a batch; in evaluation, only those of one layer exist at a time."""
    hidden, tokens = number(config, "hidden_size"), batch * length
    heads, layers = number(config, "num_attention_heads", 1), number(config, "num_hidden_layers")
    layer = tokens * (14 * hidden + 3 * number(config, "intermediate_size", 4 * hidden))
    # intermediate results of some variants for each token, or each pair of blocks
    layer += 2 * tokens * heads * number(config, "num_random_features")
    layer += 2 * tokens * hidden * max(0, number(config, "num_hashes") - 1)
    blocks = math.ceil(length / max(1, number(config, "block_size", 64)))
    layer += 2 * batch * heads * blocks**2 * number(config, "sinkhorn_iterations")
    return FLOAT * layer * (layers if training else 1)


def check_layers(config: PreTrainedConfig, remedy: str = "") -> None:
    """Raise TooLargeError if a model has too many layers to build, or iterations to run."""
    for name, most in MOST.items():
        if (found := number(config, name)) > most:
            raise TooLargeError(f"{name} ({found:,}) must be at most {most:,}.{remedy}")


def check_model(config: PreTrainedConfig, remedy: str = "") -> None:
    """Raise TooLargeError if one copy of the weights exceeds the machine's memory, or there are too many layers."""
    check_layers(config, remedy)
    estimate = Estimate(activations=activations_of(config, 1, 1, training=False))
    for parameters in (parameters_by_sizes, parameters_of):  # the second builds the buffers of a model
        estimate.weights = FLOAT * parameters(config)
        estimate.check(remedy=remedy)
