"""A cache for decoders whose rules are windows with sinks; its size does not grow with the text."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..models.base_cache import PatternCacheLayer
from .rules import parse_rule, specs_of_layers

UNPLACED = -2  # position of tokens that attention has not numbered yet


class BoundedLayer(PatternCacheLayer):
    """Keys and values of the sinks and the window.

    A model passes keys to its cache without information about padding. Therefore they are stored first, and numbered
    when the attention function, which has the mask, finds this layer attached to its keys.
    """

    pending: int

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):  # type: ignore[override]
        """Append (b, h, n, d) keys and values and return all stored ones."""
        if self.pending:
            raise ValueError(
                f"{self.pending} tokens of a BoundedCache were never attended to: use it with a model whose layers run "
                'with attn_implementation="efficient".'
            )
        rows, _, self.pending, _ = key_states.shape
        recorded, self.records_past = self.records_past, True  # nothing can be dropped before it is numbered
        unplaced = torch.full((rows, self.pending), UNPLACED, device=key_states.device)
        keys, values, _ = super().update(key_states, value_states, unplaced)
        self.records_past = recorded
        keys.bounded_layer = self  # type: ignore[reportAttributeAccessIssue]
        return keys, values

    def place(self, positions: Tensor) -> Tensor:
        """Number the tokens of the last update, (b, n), -1 at padding. Returns the positions of all keys, (b, k)."""
        kept = self.positions[:, : self.positions.shape[1] - self.pending]
        self.positions = everything = torch.cat([kept, positions.expand(len(kept), -1)], 1)
        self.pending = 0
        if not self.records_past:
            self.evict_if_full()
        return everything

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (0 if self.is_empty else self.positions.shape[1]) + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.pending = 0


class BoundedCache(Cache):
    """A cache for decoders in which every layer has a rule with a finite window, such as "local:1024 | global:4".

    Pass a new one to `generate(past_key_values=BoundedCache(model))` or to the model. It stores the sinks and at most
    twice the window of each row, so that memory and time per token do not grow with the text. The generated text is the
    same as without a cache, also with left padding and beam search. Raises ValueError if a layer has no such rule.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        stored, count = config.efficient_attention, config.num_hidden_layers
        layers = []
        for number, spec in enumerate([None] * count if stored is None else specs_of_layers(stored, count)):
            rule = None if spec is None else parse_rule(spec, causal=True)
            if rule is None or rule.reach is None:
                asked = "no rule" if rule is None else f"{spec!r}, which attends to the whole past"
                raise ValueError(
                    f"layer {number} has {asked}: first call set_attention(model, pattern) with a window for all "
                    "layers, e.g. 'local:1024 | global:4'."
                )
            layers.append(BoundedLayer(rule.sinks, rule.reach + 1))
        super().__init__(layers=layers)
