r"""Sparse Sinkhorn Attention: attention to the own block and a learned mixture of blocks (arXiv:2002.11296).

.. math:: P = \mathrm{Sinkhorn}\big((f(\bar x)\, g(\bar x)^\top + \varepsilon)/\tau\big), \qquad
          o_i = \mathrm{softmax}\big(q_i [k_{b(i)}, P_{b(i)} k]^\top/\sqrt d\big)\,[v_{b(i)}, P_{b(i)} v]

Tay et al. 2020: blocks are pooled, a small network scores them against each other, and Sinkhorn's normalisation of the
scores, with Gumbel noise in training, is a soft permutation P of the blocks. A query attends to its own block b(i)
and to the sorted block at the same place. O(n·(block_size + n/block_size)·d).

*Paper*: the network computes one logit per block and place, which fixes the number of blocks. Here a bilinear form of
two networks scores any number of them. *Paper*: blocks are pooled by sums. Here by means, so that scores do not grow
with the block size.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F
from transformers.generation import GenerationMixin

from .attn_sinkhorn import in_blocks, real_tokens, sinkhorn_attention, sinkhorn_matrix
from .base_attention import MultiHeadAttention
from .base_backbone import Backbone
from .base_block_sorting import BlockSorting, SortingNetwork
from .base_cache_sinkhorn import SinkhornCacheLayer, attend_to_cache
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
from .base_mixer import SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least
from .ops_tracing import is_traced


@strict
class EtSinkhornConfig(EtConfig):
    """
    Args:
        block_size: tokens of a block.
        sinkhorn_iterations: normalisations of rows and columns; 0 leaves a softmax over the blocks.
        sinkhorn_temperature: temperature of the permutation; the lower, the harder it is.
        gumbel_noise: is noise added to the scores in training?
        sortcut_blocks: all queries of an encoder attend to the first so many sorted blocks, and to nothing else; None
            lets each attend to its own block and the sorted one at the same place.
    """

    model_type = "et_sinkhorn"

    block_size: int = 64
    sinkhorn_iterations: int = 8
    sinkhorn_temperature: float | int = 0.75
    gumbel_noise: bool = True
    sortcut_blocks: int | None = None

    def __post_init__(self, **kwargs):
        # the field was called `temperature` once, and `generate` took it for its sampling temperature: checkpoints of
        # that time still hold the old name
        if "temperature" in kwargs:
            self.sinkhorn_temperature = kwargs.pop("temperature")
        super().__post_init__(**kwargs)

    def validate_sorting(self):
        check_at_least("block_size", self.block_size, 1, "it counts the tokens that are sorted together")
        check_at_least("sinkhorn_iterations", self.sinkhorn_iterations, 0, "0 leaves a softmax over the blocks")
        if self.sinkhorn_temperature <= 0:
            raise ValueError(
                f"sinkhorn_temperature ({self.sinkhorn_temperature}) must be above 0: scores are divided by it."
            )
        if self.sortcut_blocks is not None:
            check_at_least("sortcut_blocks", self.sortcut_blocks, 1, "None reads the own and one sorted block")
            if self.is_decoder:
                raise ValueError(
                    f"sortcut_blocks ({self.sortcut_blocks}) cannot be causal, for all queries read the same sorted "
                    "blocks: set sortcut_blocks=None for a decoder."
                )


class EtSinkhornAttention(BlockSorting, MultiHeadAttention):
    """Sorts the blocks, then attends. In a decoder, the mixture of a block depends on tokens up to its first one."""

    cache_class = SinkhornCacheLayer

    def __init__(self, config: EtSinkhornConfig, layer: int):
        super().__init__(config, layer)
        config.validate_sorting()  # is_decoder may have been set since the config was made
        self.sorting_network = SortingNetwork(config)

    def new_cache_layer(self) -> SinkhornCacheLayer:
        return SinkhornCacheLayer(self.config.block_size)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are computed and no past is cached."""
        config, causal = self.config, self.config.is_decoder
        q, k = (self.split_heads(proj(hidden), sequence.rotary) for proj in (self.q_proj, self.k_proj))
        v = self.split_heads(self.v_proj(hidden))
        if sequence.cache is not None:
            memory: SinkhornCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            seen = memory.get_seq_length()
            memory.update(hidden, k, v, sequence.positions)
            if seen:
                return attend_to_cache(q, sequence.positions, memory, self.sort_causally, self.dropout), None
        length, size = q.shape[2], config.block_size
        real = real_tokens(hidden, size, sequence.padding_mask)
        order = self.sort_causally(*self.pool(hidden)) if causal else self.sort(hidden, real)
        if config.sortcut_blocks is not None:
            if is_traced():  # a traced count may be too small; rows of zeros have no effect
                order = F.pad(order, (0, 0, 0, config.sortcut_blocks))
            order = order[:, :, : config.sortcut_blocks]
        how = order, real, causal, config.sortcut_blocks is not None
        queries, keys, values = (in_blocks(x, size).contiguous() for x in (q, k, v))
        if self.engine(hidden, sequence) == "dense":
            weights = sinkhorn_matrix(queries, keys, *how)[:, :, :length, :length]
            if sequence.padding_mask is not None:
                weights = weights * sequence.padding_mask[:, None, :, None]
            return F.dropout(weights, self.dropout) @ v, weights
        out = sinkhorn_attention(queries, keys, values, *how, self.dropout).flatten(2, 3)
        if is_traced():  # a slice would ask how a traced length compares
            return out.index_select(2, torch.arange(length, device=q.device)), None
        return out[:, :, :length], None

    @property
    def dropout(self) -> float:
        return self.config.attention_probs_dropout_prob if self.training else 0.0


class EtSinkhornPreTrainedModel(EtPreTrainedModel):
    config: EtSinkhornConfig
    mixer_class = EtSinkhornAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtSinkhornModel(Backbone, EtSinkhornPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtSinkhornPreTrainedModel.model_class = EtSinkhornModel


class EtSinkhornForMaskedLM(ForMaskedLM, EtSinkhornPreTrainedModel): ...


class EtSinkhornForCausalLM(ForCausalLM, EtSinkhornPreTrainedModel, GenerationMixin):
    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load the generation config, without the sampling temperature that old checkpoints contain by mistake.

        transformers derives it from the model config's old field `temperature`: saved in generation_config.json, or
        read from config.json where there is no such file.
        """
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[reportAttributeAccessIssue]
        generation = self.generation_config
        if generation._from_model_config and generation.temperature == self.config.sinkhorn_temperature:
            generation.temperature = None


class EtSinkhornForSequenceClassification(ForSequenceClassification, EtSinkhornPreTrainedModel): ...


class EtSinkhornForTokenClassification(ForTokenClassification, EtSinkhornPreTrainedModel): ...


class EtSinkhornForQuestionAnswering(ForQuestionAnswering, EtSinkhornPreTrainedModel): ...


class EtSinkhornForMultipleChoice(ForMultipleChoice, EtSinkhornPreTrainedModel): ...


class EtSinkhornForImageClassification(ForImageClassification, EtSinkhornPreTrainedModel): ...
