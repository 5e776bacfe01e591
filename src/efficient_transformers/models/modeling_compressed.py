r"""Memory-compressed attention: keys and values shortened by a strided convolution (Liu et al. 2018, arXiv:1801.10198).

.. math:: o_i = \sum_s \mathrm{softmax}_s(q_i^\top k'_s/\sqrt d)\, v'_s, \qquad
          k'_s = \sum_{t < \kappa} C_t\, k_{(s+1)f - \kappa + t}

Section 4.2.3: a segment of f tokens is compressed to one key and one value. Such layers alternate with local ones,
whose tokens attend to their own block. A kernel longer than a segment extends over the segments before it, with zeros
at padding. In a decoder, a token attends to the segments that end at or before it. O(n²/f·d), O(n·block_size·d) where
local.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .attn_compressed import causal_attention, compress, compressed_weights
from .attn_sinkhorn import real_tokens
from .base_attention import PatternAttention
from .base_backbone import Backbone
from .base_cache_compressed import CompressedCacheLayer, attend_to_cache
from .base_configuration import EtConfig, PatternConfig
from .base_heads import (
    ForCausalLM,
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_mixer import SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least
from .ops_patterns import AttentionPattern
from .ops_tracing import is_traced

Kind = Literal["local", "compressed"]


@strict
class EtCompressedConfig(PatternConfig, EtConfig):
    """
    Args:
        attention_layers: kinds of the layers in turn, each `local` or `compressed`; tiled over the layers.
        compression_factor: f, tokens of a segment.
        kernel_size: κ, tokens under the kernel, of which the last ones are those of the segment; None means f.
        block_size: tokens of a block of the local layers.
    """

    model_type = "et_compressed"
    takes_anchors: ClassVar[bool] = False

    attention_layers: list[Kind] | None = None
    compression_factor: int = 4
    kernel_size: int | None = None
    block_size: int = 256

    def validate_compression(self):
        check_at_least("compression_factor", self.compression_factor, 1, "1 keeps every token")
        check_at_least("block_size", self.block_size, 1, "a block holds tokens")
        if self.kernel_size is not None:
            remedy = f"compression_factor is {self.compression_factor}, and no token may go unread; or None"
            check_at_least("kernel_size", self.kernel_size, self.compression_factor, remedy)
        if self.attention_layers is not None and not self.attention_layers:
            raise ValueError("attention_layers ([]) must name a kind: None takes 'local' and 'compressed' in turn.")

    @property
    def kernel(self) -> int:
        return self.kernel_size or self.compression_factor

    def kind(self, layer: int) -> Kind:
        kinds: list[Kind] = self.attention_layers or ["local", "compressed"]
        return kinds[layer % len(kinds)]

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        if self.kind(layer) == "local":
            return [AttentionPattern(window=0, in_blocks=True, block_size=self.block_size, causal=self.is_decoder)]
        return [AttentionPattern(window=None, causal=self.is_decoder)]


class EtCompressedAttention(PatternAttention):
    """Block-local or compressed attention, by the layer."""

    def __init__(self, config: EtCompressedConfig, layer: int):
        super().__init__(config, layer)
        self.is_local = config.kind(layer) == "local"
        if not self.is_local:
            self.cache_class = CompressedCacheLayer
            # one convolution of keys and one of values, head by head; the paper leaves open whether it mixes heads
            sizes = (2, self.num_heads, config.kernel, self.head_dim, self.head_dim)
            self.convolution = nn.Parameter(torch.empty(sizes))

    def reset_parameters(self) -> None:
        if not self.is_local:  # the mean of the tokens; the paper does not say how it begins
            init.copy_(self.convolution, torch.eye(self.head_dim).expand_as(self.convolution) / self.config.kernel)

    def new_cache_layer(self):
        return super().new_cache_layer() if self.is_local else self.new_compressed_layer()

    def new_compressed_layer(self) -> CompressedCacheLayer:
        return CompressedCacheLayer(self.config.compression_factor, self.config.kernel)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if requested and no past is cached.

        The weight of a segment is divided equally among its real tokens.
        """
        return super().attend(hidden, sequence) if self.is_local else self.attend_to_segments(hidden, sequence)

    def attend_to_segments(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        factor, causal = self.config.compression_factor, self.config.is_decoder
        dropout = self.dropout if self.training else 0.0
        q = self.split_heads(self.q_proj(hidden), sequence.rotary)
        k, v = self.split_heads(self.k_proj(hidden), sequence.rotary), self.split_heads(self.v_proj(hidden))
        if sequence.cache is not None:
            memory: CompressedCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            if seen := memory.get_seq_length():
                memory.write(self.compress_pair)
            memory.update(k, v, sequence.positions)
            if seen:
                memory.write(self.compress_pair)
                return attend_to_cache(q, sequence.positions, memory, dropout), None
        real = real_tokens(hidden, factor, sequence.padding_mask)
        k, v = (compress(x, weight, factor, real) for x, weight in zip((k, v), self.convolution, strict=True))
        if self.engine(hidden, sequence) == "dense":
            weights, spread = compressed_weights(q, k, v, factor, causal, sequence.positions >= 0)
            return F.dropout(weights @ spread, dropout) @ v, weights
        if causal:
            return causal_attention(q, k, v, factor, dropout), None
        mask = None
        if real is not None and (sequence.padding_mask is not None or is_traced()):
            # finite, because a row may hold nothing but padding
            mask = q.new_zeros(real.shape[:2]).masked_fill(~real.any(-1), torch.finfo(q.dtype).min / 2)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None

    def compress_pair(self, pair: Tensor) -> Tensor:
        weights, factor = self.convolution, self.config.compression_factor
        return torch.stack([compress(x, weight, factor) for x, weight in zip(pair, weights, strict=True)])


class EtCompressedPreTrainedModel(EtPreTrainedModel):
    config: EtCompressedConfig
    mixer_class = EtCompressedAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtCompressedModel(Backbone, EtCompressedPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtCompressedPreTrainedModel.model_class = EtCompressedModel


class EtCompressedForMaskedLM(ForMaskedLM, EtCompressedPreTrainedModel): ...


class EtCompressedForCausalLM(ForCausalLM, EtCompressedPreTrainedModel, GenerationMixin): ...


class EtCompressedForSequenceClassification(ForSequenceClassification, EtCompressedPreTrainedModel): ...


class EtCompressedForTokenClassification(ForTokenClassification, EtCompressedPreTrainedModel): ...


class EtCompressedForQuestionAnswering(ForQuestionAnswering, EtCompressedPreTrainedModel): ...


class EtCompressedForMultipleChoice(ForMultipleChoice, EtCompressedPreTrainedModel): ...


class EtCompressedForImageClassification(ForImageClassification, EtCompressedPreTrainedModel): ...
