r"""gMLP: a gated MLP instead of attention and MLP, whose gate mixes positions (Liu et al. 2021, arXiv:2105.08050).

.. math:: [Z_1, Z_2] = \sigma(X U), \qquad Y = \big(Z_1 \odot (W\, \mathrm{norm}(Z_2) + b)\big) V

Section 2. W (n, n) and b (n) depend on positions only. W is initialized near 0 and b to 1, so that each block starts as
an ordinary MLP. `tiny_attention_size` adds one small attention head to the gate: aMLP, section 4. In a decoder, W is
lower triangular. O(n²·intermediate_size/2), whatever the input; W has a row for each of
`max_position_embeddings`, of which a shorter sequence uses the first ones.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin

from .attn_dense import softmax_attention
from .attn_pattern import pattern_attention
from .base_backbone import Backbone
from .base_cache import PatternCacheLayer
from .base_configuration import EtConfig
from .base_heads import (
    ForCausalLM,
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_mixer import Mixer, SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least, check_divisible
from .ops_engine import choose_engine
from .ops_patterns import AttentionPattern
from .ops_tracing import first_positions
from .ops_tril_matmul import triangular_product


@strict
class EtGmlpConfig(EtConfig):
    """
    Args:
        intermediate_size: width of the block between U and the gate, which halves it; even.
        tiny_attention_size: width of the head that is added to the gate; None has none.
        position_embedding_type: `none` by default, as in the paper: W tells the positions apart.
    """

    model_type = "et_gmlp"
    attends: ClassVar[bool] = False

    tiny_attention_size: int | None = None
    position_embedding_type: Literal["learned", "sinusoidal", "rotary", "none"] = "none"

    def validate_gate(self):
        check_divisible("intermediate_size", self.intermediate_size, "2", 2, "one half of it gates the other")
        if self.tiny_attention_size is not None:
            check_at_least("tiny_attention_size", self.tiny_attention_size, 1, "None has no attention")
        if self.reversible:
            raise ValueError(
                f"reversible ({self.reversible}) needs a mixer and an MLP that take turns, and a gMLP block is one "
                "thing: set reversible=False and use gradient checkpointing."
            )


class TinyAttention(nn.Module):
    """One head over the block's normalised input, (b, n, e) -> (b, n, f/2)."""

    def __init__(self, config: EtGmlpConfig, size: int):
        super().__init__()
        self.config, self.pattern = config, AttentionPattern(window=None, causal=config.is_decoder)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * size)
        self.o_proj = nn.Linear(size, config.intermediate_size // 2)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, e) -> queries, keys and values, (b, 1, n, d) each."""
        q, k, v = self.qkv_proj(hidden)[:, None].chunk(3, -1)
        return q, k, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo) -> Tensor:
        if choose_engine(q.device, self.config._attn_implementation) == "dense":
            return self.read(q, k, v, sequence.positions, sequence.positions)
        return self.o_proj(pattern_attention(q, k, v, self.pattern, sequence)[:, 0])

    def read(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Output with the weights written out, of queries at positions `i` (b, n) and keys at `j` (b, m)."""
        allowed = readable(i, j) if self.config.is_decoder else (j >= 0)[:, None]
        return self.o_proj(softmax_attention(q, k, v, allowed[:, None])[0][:, 0])


def readable(i: Tensor, j: Tensor) -> Tensor:
    """Causal mask of queries at positions `i` (b, n) and keys at `j` (b, m), (b, n, m); -1 is padding."""
    return (j[:, None] <= i[..., None]) & (j[:, None] >= 0)


class SpatialGatingMixer(Mixer):
    """The whole block. `attn_implementation="eager"` writes out what is chunked or fused otherwise."""

    is_whole_block = True
    cache_class = PatternCacheLayer
    position_axes = {"spatial_weight": (0, 1), "spatial_bias": (0,)}
    summed_axes = {"spatial_weight": (1,)}

    def __init__(self, config: EtGmlpConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        half, length, size = config.intermediate_size // 2, config.max_position_embeddings, config.tiny_attention_size
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(half, eps=config.layer_norm_eps)
        self.spatial_weight = nn.Parameter(torch.empty(length, length))
        self.spatial_bias = nn.Parameter(torch.empty(length))
        self.tiny_attention = None if size is None else TinyAttention(config, size)
        self.down_proj = nn.Linear(half, config.hidden_size)

    def reset_parameters(self) -> None:
        init.normal_(self.spatial_weight, std=self.config.initializer_range / self.config.max_position_embeddings)
        init.ones_(self.spatial_bias)

    def new_cache_layer(self) -> PatternCacheLayer:
        """A cache with norm(Z₂) of all tokens as keys, and keys and values of the tiny attention, if any, as values."""
        return PatternCacheLayer(0, None)

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, None]:
        """(b, n, e) -> (b, n, e)."""
        content, gate = self.activation(self.up_proj(hidden)).chunk(2, -1)  # (b, n, f/2)
        gate, attention = self.norm(gate), self.tiny_attention
        q = k = v = gate[:, None, :, :0]  # of no attention
        if attention is not None:
            q, k, v = attention.project(hidden)
        if sequence.cache is not None:
            memory: PatternCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            seen = memory.get_seq_length()
            gates, keys_values, positions = memory.update(gate[:, None], torch.cat([k, v], -1), sequence.positions)
            if seen:
                mixed = self.mix_behind(gates[:, 0], sequence.positions, positions)
                if attention is not None:
                    keys, values = keys_values.chunk(2, -1)
                    mixed = mixed + attention.read(q, keys, values, sequence.positions, positions)
                return self.down_proj(content * mixed), None
        mixed = self.mix(gate if sequence.padding_mask is None else gate * sequence.padding_mask[..., None])
        if attention is not None:
            mixed = mixed + attention(q, k, v, sequence)
        return self.down_proj(content * mixed), None

    def mix(self, gate: Tensor) -> Tensor:
        """W·gate + b over the positions of `gate` (b, n, f/2), which is zero at padding."""
        weight = first_positions(self.spatial_weight, gate.shape[1], 0, 1)
        bias = first_positions(self.spatial_bias, gate.shape[1], 0)[:, None]
        if not self.config.is_decoder:
            return weight @ gate + bias
        if choose_engine(gate.device, self.config._attn_implementation) == "dense":
            return weight.tril() @ gate + bias
        return triangular_product(weight, gate) + bias

    def mix_behind(self, gates: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """`mix` for new tokens at positions `i` (b, n), with the `gates` (b, m, f/2) of all tokens at `j` (b, m)."""
        rows, columns = i.clamp(min=0), j.clamp(min=0)
        weight = self.spatial_weight[rows[..., None], columns[:, None]] * readable(i, j)  # (b, n, m)
        return weight @ gates + self.spatial_bias[rows][..., None]


class EtGmlpPreTrainedModel(EtPreTrainedModel):
    config: EtGmlpConfig
    mixer_class = SpatialGatingMixer
    _supports_flex_attn = False


class EtGmlpModel(Backbone, EtGmlpPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtGmlpPreTrainedModel.model_class = EtGmlpModel


class EtGmlpForMaskedLM(ForMaskedLM, EtGmlpPreTrainedModel): ...


class EtGmlpForCausalLM(ForCausalLM, EtGmlpPreTrainedModel, GenerationMixin): ...


class EtGmlpForSequenceClassification(ForSequenceClassification, EtGmlpPreTrainedModel): ...


class EtGmlpForTokenClassification(ForTokenClassification, EtGmlpPreTrainedModel): ...


class EtGmlpForQuestionAnswering(ForQuestionAnswering, EtGmlpPreTrainedModel): ...


class EtGmlpForMultipleChoice(ForMultipleChoice, EtGmlpPreTrainedModel): ...


class EtGmlpForImageClassification(ForImageClassification, EtGmlpPreTrainedModel): ...
