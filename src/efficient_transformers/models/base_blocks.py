"""Blocks of a token mixer and an MLP, with one residual stream or with two that are reversible."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .base_configuration import EtConfig
from .base_mixer import SequenceInfo
from .base_reversible import chunks
from .ops_tracing import is_traced


class EtMLP(nn.Module):
    def __init__(self, config: EtConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class EtBlock(GradientCheckpointingLayer):
    """hidden ─ norm ─ mixer ─ + ─ norm ─ MLP ─ +, or with the norms after the sums; some mixers are a whole block."""

    def __init__(self, config: EtConfig, mixer: nn.Module):
        super().__init__()
        self.norm_first = config.norm_first
        self.mixer = mixer
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.has_mlp = not mixer.is_whole_block
        if self.has_mlp:
            self.mlp = EtMLP(config)
            self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.mix(hidden, sequence)
        if self.norm_first:
            hidden = hidden + mixed
            return hidden + self.feed_forward(hidden) if self.has_mlp else hidden, weights
        hidden = self.mixer_norm(hidden + mixed)
        if not self.has_mlp:
            return hidden, weights
        return self.mlp_norm(hidden + self.feed_forward(hidden)), weights

    def mix(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Output of the mixer, which is added to `hidden` (b, n, e), and its weights if it returns any."""
        mixed, weights = sequence.mix(self.mixer, self.mixer_norm(hidden) if self.norm_first else hidden)
        return self.dropout(mixed), weights

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to `hidden` (b, n, e), by `chunk_size` positions at a time.

        No more than the activations of one chunk exist at once, in a backward pass neither.
        """
        if not self.chunk_size:
            return self.feed_forward_chunk(hidden)
        rule = self.feed_forward_chunk
        if torch.is_grad_enabled() and not is_traced():
            rule = partial(checkpoint, rule, use_reentrant=False)
        return torch.cat([rule(hidden[:, rows]) for rows in chunks(hidden.shape[1], self.chunk_size)], 1)

    def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.mlp_norm(hidden) if self.norm_first else hidden))


class EtReversibleBlock(EtBlock):
    """Two streams: the mixer maps the second and adds to the first, then the MLP the other way round.

    The streams may be wider than the weights.
    """

    def forward(self, x1: Tensor, x2: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        mixed, weights = self.mix(x2, sequence)
        y1 = x1 + mixed
        return y1, x2 + self.feed_forward(y1), weights

    def mix(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        return super().mix(hidden.to(self.mixer_norm.weight.dtype), sequence)

    def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
        return super().feed_forward_chunk(hidden.to(self.mlp_norm.weight.dtype))
