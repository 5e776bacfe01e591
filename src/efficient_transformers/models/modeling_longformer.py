r"""Longformer: a sliding window and a few global tokens in one softmax (Beltagy et al. 2020, arXiv:2004.05150).

.. math:: S(i) = \{j : |i-j| \le w/2 \cdot s,\; s \mid i-j\} \cup G, \qquad
          S(i) = \{0, \dots, n-1\} \text{ for } i \in G

Section 3.1: a window w, wider in upper layers, dilated by s in some heads, and global tokens G chosen for the task.
The rows of G are computed with projections of their own. `head_layout="per_head"` puts window, strided window and
global tokens on different heads instead of uniting them. O(n·w·d + n·g·d).
"""

from copy import deepcopy
from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.generation import GenerationMixin

from .base_backbone import Backbone
from .base_configuration import EtConfig, PatternConfig
from .base_global_rows import GlobalRowsAttention
from .base_heads import (
    ForCausalLM,
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least, check_divisible, check_entries
from .ops_patterns import AttentionPattern


@strict
class EtLongformerConfig(PatternConfig, EtConfig):
    """
    Args:
        attention_window: w, tokens of the window on both sides, even; one number, or one for each layer. `et_local`
            counts one side.
        attention_dilation: s; one number, one for each layer, or for each layer one for each head.
        num_global_tokens: the first tokens of every sequence that are global, to which `global_attention_mask` adds;
            None leaves it to the head: 1 where a whole sequence is judged, the question for question answering,
            otherwise 0 (1 with `per_head`). In a causal model, attention to global tokens is
            causal, and callers cannot add any.
        sep_token_id: ends the question in question answering.
        head_layout: `union` attends to window and global tokens in one softmax, as in the paper; `per_head` has local,
            strided and global heads in turn.
        stride, hops: of the strided heads.
    """

    model_type = "et_longformer"

    attention_window: int | list[int] = 256
    attention_dilation: int | list[int] | list[list[int]] = 1
    num_global_tokens: int | None = None
    sep_token_id: int | None = None
    head_layout: Literal["union", "per_head"] = "union"
    stride: int = 64
    hops: int | None = 2

    def validate_longformer(self):
        self.check_per_layer("attention_window", 2, "it counts the neighbours read on both sides together")
        for window in self.attention_window if isinstance(self.attention_window, list) else [self.attention_window]:
            check_divisible("attention_window", window, "2", 2, "it counts both sides together")
        check_at_least("num_global_tokens", self.num_global_tokens or 0, 0, "0 leaves the choice to the caller")
        self.check_stride()
        if self.head_layout == "per_head":
            check_at_least("num_attention_heads", self.num_attention_heads, 3, "per_head has three kinds of heads")
            if self.attention_dilation != 1:
                raise ValueError(
                    f"attention_dilation ({self.attention_dilation}) is for head_layout 'union': 'per_head' has "
                    "strided heads, set stride and hops."
                )
        for layer in range(self.num_hidden_layers):
            for dilation in self.dilations(layer):
                check_at_least("attention_dilation", dilation, 1, "1 is a window without gaps")

    def dilations(self, layer: int) -> list[int]:
        """Of the heads of one layer, or one for all of them."""
        dilation = self.attention_dilation
        if isinstance(dilation, list):
            remedy = "give one number for all layers or an entry for each"
            check_entries("attention_dilation", dilation, "num_hidden_layers", self.num_hidden_layers, remedy)
            dilation = dilation[layer]
        if not isinstance(dilation, list):
            return [dilation]
        name, remedy = f"attention_dilation of layer {layer}", "give one number for all heads or one for each"
        check_entries(name, dilation, "num_attention_heads", self.num_attention_heads, remedy)
        return dilation

    @property
    def has_global_projections(self) -> bool:
        return self.head_layout == "union" and not self.is_decoder

    def folds_global_rows(self, count: int) -> bool:
        """Are `count` global tokens so few that `folded_attention` is cheaper than two projections of everything?"""
        turned = self.position_embedding_type == "rotary"  # then keys differ by more than their hidden state
        few = not isinstance(count, int) or count * (self.num_attention_heads - 1) < self.hidden_size  # or a symbol
        return not turned and few

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        window, causal = self.per_layer("attention_window", layer) // 2, self.is_decoder
        count = self.num_global_tokens
        if self.head_layout == "union":
            tokens = tuple(range(count or 0))
            return [AttentionPattern(window, s, global_tokens=tokens, causal=causal) for s in self.dilations(layer)]
        return [
            AttentionPattern(window, causal=causal),
            AttentionPattern(self.hops, self.stride, causal=causal),
            AttentionPattern(global_tokens=tuple(range(1 if count is None else count)), causal=causal),
        ]


class LongformerAttention(GlobalRowsAttention):
    """Window and global tokens; the rows of the latter have projections of their own."""

    def __init__(self, config: EtLongformerConfig, layer: int):
        super().__init__(config, layer)
        if config.has_global_projections:
            self.add_global_projections()

    def takes_global_mask(self, pattern: AttentionPattern) -> bool:
        return self.config.head_layout == "union" or pattern.is_own  # of separate heads, only the global ones


class EtLongformerPreTrainedModel(EtPreTrainedModel):
    config: EtLongformerConfig
    mixer_class = LongformerAttention


class EtLongformerModel(Backbone, EtLongformerPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""

    has_marked_tokens = True


EtLongformerPreTrainedModel.model_class = EtLongformerModel


class FirstTokenIsGlobal:
    """Mixin of heads for whole sequences: makes the first token global (section 3.1)."""

    @classmethod
    def own_config(cls, config: EtLongformerConfig) -> EtLongformerConfig:
        config = super().own_config(config)  # type: ignore[misc]
        if config.num_global_tokens is not None:
            return config
        config = deepcopy(config)
        config.num_global_tokens = 1
        return config


class EtLongformerForMaskedLM(ForMaskedLM, EtLongformerPreTrainedModel): ...


class EtLongformerForCausalLM(ForCausalLM, EtLongformerPreTrainedModel, GenerationMixin): ...


class EtLongformerForSequenceClassification(
    FirstTokenIsGlobal, ForSequenceClassification, EtLongformerPreTrainedModel
): ...


class EtLongformerForTokenClassification(ForTokenClassification, EtLongformerPreTrainedModel): ...


class EtLongformerForQuestionAnswering(ForQuestionAnswering, EtLongformerPreTrainedModel):
    """Makes the tokens before the first `sep_token_id` global, unless `global_attention_mask` is passed."""

    def global_tokens(self, input_ids: Tensor | None, global_mask: Tensor | None) -> Tensor | None:
        config: EtLongformerConfig = self.config  # type: ignore[reportAssignmentType]
        if global_mask is not None or config.num_global_tokens is not None or config.sep_token_id is None:
            return global_mask
        if input_ids is None:
            raise ValueError(
                "the question cannot be found in inputs_embeds: pass global_attention_mask, or set num_global_tokens."
            )
        ends = (input_ids == config.sep_token_id).cumsum(1)
        return (ends == 0) & (ends[:, -1:] > 0)


class EtLongformerForMultipleChoice(FirstTokenIsGlobal, ForMultipleChoice, EtLongformerPreTrainedModel): ...


class EtLongformerForImageClassification(ForImageClassification, EtLongformerPreTrainedModel): ...
