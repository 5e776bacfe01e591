"""The base of all token mixers, and the facts about a batch that a model passes to them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .base_packing import Group
from .ops_engine import BatchRows


@dataclass
class SequenceInfo(BatchRows):
    """Facts about a batch that a mixer may use besides its hidden states. Rows are packed: real tokens first.

    positions: index of each real token in its row, -1 at padding, (b, n).
    padding_mask, lengths, global_mask, global_tokens, block_masks: as in `BatchRows`.
    rotary: cos and sin of the angles, (b, n, 1, d/2) each.
    cache: of a causal model; holds everything before these tokens.
    shared: a module of the model whose weights all its mixers use; None if there is none.
    decisions: data-dependent choices of the mixers, by layer. A layer that runs a second time, to be differentiated,
        finds them here: rounding must not send a token elsewhere than in the first run.
    """

    positions: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    output_attentions: bool = False
    shared: nn.Module | None = None
    decisions: dict[int, Any] = field(default_factory=dict)

    def cached_choice(self, layer: int, choose: Callable[[], Any]) -> Any:
        """Return `choose()`, computed when `layer` first asks. It has no gradient."""
        if layer not in self.decisions:
            with torch.no_grad():
                self.decisions[layer] = choose()
        return self.decisions[layer]

    def mix(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply `mixer` to `hidden` (b, n, e); returns its output and its weights, if it has any."""
        return mixer(hidden, self)

    @property
    def parts(self) -> "list[SequenceInfo]":
        """A `SequenceInfo` for each call of the mixer: several for packed documents."""
        return [self]


@dataclass
class PackedDocuments(SequenceInfo):
    """Documents of packed rows: all their tokens in one row, (1, t, e), given to a mixer one group at a time.

    They are grouped by length rather than padded into one batch, so that one long document does not lengthen all
    others. Only the mixer runs once per group. Processes with different numbers of groups still run each block
    once, as sharded parameters require.

    groups: documents of about one length, with the facts about them. places: index of each token of the row in the
        concatenation of the flattened groups, (t,).
    """

    groups: list[tuple[Group, SequenceInfo]] = field(default_factory=list)
    places: Tensor = field(default_factory=Tensor)

    def mix(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, None]:
        mixed = [sequence.mix(mixer, group.gather(hidden[0]))[0].flatten(0, 1) for group, sequence in self.groups]
        return torch.cat(mixed).index_select(0, self.places)[None], None

    @property
    def parts(self) -> list[SequenceInfo]:
        return [sequence for _, sequence in self.groups]


class OwnValues(nn.Module):
    """A module that initialises its own parameters and buffers, and states which of their axes are positions.

    position_axes: axes that grow with the longest input, by the name of the parameter or buffer of this module;
        `resize_positions` stretches them.
    summed_axes: those of them that the module sums over, whose entries shrink as their number grows.
    """

    position_axes: ClassVar[dict[str, tuple[int, ...]]] = {}
    summed_axes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def reset_parameters(self) -> None:
        """Initialise the parameters and buffers of this module itself, through transformers' `initialization`."""

    @property
    def learns(self) -> bool:
        """True if all parameters of this module are trained. Only then may its buffers follow the data.

        An adapter is saved without the buffers of its base, whose parameters are frozen: they must stay as they are in
        the base's checkpoint. A copy that PEFT trains as a whole (`modules_to_save`) is saved with its buffers.
        """
        return all(parameter.requires_grad for parameter in self.parameters())

    def register_drawn(self, name: str, values: Tensor) -> None:
        """Register a buffer of `values`, drawn on the CPU, on the device where the module is being built."""
        self.register_buffer(name, values.to(torch.get_default_device()))

    def resized(self) -> None:
        """Called when the longest input has changed, to update anything that depends on it besides `position_axes`."""


class Mixer(OwnValues):
    """Base of all token mixers: forward(hidden, sequence) -> hidden and, if there are any, weights."""

    is_whole_block: ClassVar[bool] = False  # True if no MLP follows
    cache_class: type[CacheLayerMixin]  # of the return value of `new_cache_layer`

    @classmethod
    def new_shared(cls, config) -> OwnValues | None:
        """A module with weights that the mixers of all layers use; the model owns it, and `SequenceInfo` carries it."""
        return None

    def new_cache_layer(self) -> CacheLayerMixin:
        """An empty cache for this layer."""
        return self.cache_class()

    def count_pass(self) -> None:
        """Called before every forward pass in training, outside of the part that gradient checkpointing repeats."""

    def finish_pass(self, sequence: SequenceInfo) -> None:
        """Called after every forward pass in training; `decisions` of `sequence.parts` hold the layer's choices."""


def no_rows(hidden: Tensor, *layers: nn.Module) -> Tensor | float:
    """Zero, computed by `layers` from no rows of `hidden` (…, n, e).

    Added to a result computed without these layers, their parameters get a gradient of zero: DDP waits for a
    gradient of every parameter in every step, and another process may use the layers.
    """
    if not torch.is_grad_enabled():
        return 0.0
    empty = hidden[..., :0, :]
    return torch.stack([layer(empty).sum() for layer in layers]).sum()
