r"""Efficient Attention: two softmaxes instead of one (Shen et al. 2018, arXiv:1812.01243).

.. math:: O = \rho_q(Q)\,\big(\rho_k(K)^\top V\big)

with softmax over the features of each query in :math:`\rho_q` and over the positions of each feature of the keys in
:math:`\rho_k` (section 3.2, "softmax normalization"): every feature is one attention map over the sequence, and a query
combines their outputs. *Paper*: there is no decoder; here, in a decoder, :math:`\rho_k` is over the positions up to the
query's own. O(n·d²).
"""

from huggingface_hub.dataclasses import strict
from transformers.generation import GenerationMixin

from .base_backbone import Backbone
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
from .base_kernel_attention import KernelAttention, KernelConfig
from .base_pretrained import EtPreTrainedModel
from .ops_feature_maps import FEATURE_MAPS, FeatureMap


@strict
class EtEfficientConfig(KernelConfig, EtConfig):
    """`EtConfig` as it is."""

    model_type = "et_efficient"

    @property
    def features(self) -> FeatureMap:
        return FEATURE_MAPS["softmax"]


class EtEfficientPreTrainedModel(EtPreTrainedModel):
    config: EtEfficientConfig
    mixer_class = KernelAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtEfficientModel(Backbone, EtEfficientPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtEfficientPreTrainedModel.model_class = EtEfficientModel


class EtEfficientForMaskedLM(ForMaskedLM, EtEfficientPreTrainedModel): ...


class EtEfficientForCausalLM(ForCausalLM, EtEfficientPreTrainedModel, GenerationMixin): ...


class EtEfficientForSequenceClassification(ForSequenceClassification, EtEfficientPreTrainedModel): ...


class EtEfficientForTokenClassification(ForTokenClassification, EtEfficientPreTrainedModel): ...


class EtEfficientForQuestionAnswering(ForQuestionAnswering, EtEfficientPreTrainedModel): ...


class EtEfficientForMultipleChoice(ForMultipleChoice, EtEfficientPreTrainedModel): ...


class EtEfficientForImageClassification(ForImageClassification, EtEfficientPreTrainedModel): ...
