"""Full attention, the reference: softmax(QKᵀ/√d)V over the whole sequence (Vaswani et al. 2017, arXiv:1706.03762).

Backbone, heads and projections are those of all other variants, so that comparisons change only one thing. O(n²·d).
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
class EtFullConfig(PatternConfig, EtConfig):
    """`EtConfig` as it is; BERT's weights fit with `norm_first=False, classifier_pooling="cls"`."""

    model_type = "et_full"

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        return [AttentionPattern(window=None, causal=self.is_decoder)]


class EtFullPreTrainedModel(EtPreTrainedModel):
    config: EtFullConfig
    mixer_class = PatternAttention


class EtFullModel(Backbone, EtFullPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtFullPreTrainedModel.model_class = EtFullModel


class EtFullForMaskedLM(ForMaskedLM, EtFullPreTrainedModel): ...


class EtFullForCausalLM(ForCausalLM, EtFullPreTrainedModel, GenerationMixin): ...


class EtFullForSequenceClassification(ForSequenceClassification, EtFullPreTrainedModel): ...


class EtFullForTokenClassification(ForTokenClassification, EtFullPreTrainedModel): ...


class EtFullForQuestionAnswering(ForQuestionAnswering, EtFullPreTrainedModel): ...


class EtFullForMultipleChoice(ForMultipleChoice, EtFullPreTrainedModel): ...


class EtFullForImageClassification(ForImageClassification, EtFullPreTrainedModel): ...
