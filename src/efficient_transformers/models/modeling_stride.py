r"""Strided attention: each token attends to every s-th one, so that few keys cover a long range.

.. math:: S(i) = \{j : s \mid i-j,\; |i-j| \le s \cdot h\}, \qquad h = \infty \text{ for all multiples}

With h = None, it is the strided head of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509, section 4.2);
with a few hops, a dilated window (Beltagy et al. 2020, arXiv:2004.05150, section 3.1). No number of layers connects
tokens with different residues modulo s: combine it with other patterns (`et_mixed`) where that matters. O(n·h·d), or
O(n²/s·d).
"""

from huggingface_hub.dataclasses import strict
from transformers.generation import GenerationMixin

from .base_attention import PatternAttention
from .base_backbone import Backbone
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
from .base_pretrained import EtPreTrainedModel
from .ops_patterns import AttentionPattern


@strict
class EtStrideConfig(PatternConfig, EtConfig):
    """
    Args:
        stride: s, distance between the keys of a query.
        hops: number of keys on each side; None means all multiples of the stride.
    """

    model_type = "et_stride"

    stride: int = 64
    hops: int | None = None

    def validate_stride(self):
        self.check_stride()

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        return [AttentionPattern(window=self.hops, dilation=self.stride, causal=self.is_decoder)]


class EtStridePreTrainedModel(EtPreTrainedModel):
    config: EtStrideConfig
    mixer_class = PatternAttention


class EtStrideModel(Backbone, EtStridePreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtStridePreTrainedModel.model_class = EtStrideModel


class EtStrideForMaskedLM(ForMaskedLM, EtStridePreTrainedModel): ...


class EtStrideForCausalLM(ForCausalLM, EtStridePreTrainedModel, GenerationMixin): ...


class EtStrideForSequenceClassification(ForSequenceClassification, EtStridePreTrainedModel): ...


class EtStrideForTokenClassification(ForTokenClassification, EtStridePreTrainedModel): ...


class EtStrideForQuestionAnswering(ForQuestionAnswering, EtStridePreTrainedModel): ...


class EtStrideForMultipleChoice(ForMultipleChoice, EtStridePreTrainedModel): ...


class EtStrideForImageClassification(ForImageClassification, EtStridePreTrainedModel): ...
