r"""Linear Transformer: softmax replaced by a feature map (Katharopoulos et al. 2020, arXiv:2006.16236).

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)},
          \qquad \phi(x) = \mathrm{elu}(x) + 1

Equations 4, 5 and 7; in a decoder, equations 9 to 12 and 16 to 20: an RNN whose state is a matrix. O(n·d²).
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
class EtLinearConfig(KernelConfig, EtConfig):
    """`EtConfig` as it is."""

    model_type = "et_linear"

    @property
    def features(self) -> FeatureMap:
        return FEATURE_MAPS["elu"]


class EtLinearPreTrainedModel(EtPreTrainedModel):
    config: EtLinearConfig
    mixer_class = KernelAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtLinearModel(Backbone, EtLinearPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtLinearPreTrainedModel.model_class = EtLinearModel


class EtLinearForMaskedLM(ForMaskedLM, EtLinearPreTrainedModel): ...


class EtLinearForCausalLM(ForCausalLM, EtLinearPreTrainedModel, GenerationMixin): ...


class EtLinearForSequenceClassification(ForSequenceClassification, EtLinearPreTrainedModel): ...


class EtLinearForTokenClassification(ForTokenClassification, EtLinearPreTrainedModel): ...


class EtLinearForQuestionAnswering(ForQuestionAnswering, EtLinearPreTrainedModel): ...


class EtLinearForMultipleChoice(ForMultipleChoice, EtLinearPreTrainedModel): ...


class EtLinearForImageClassification(ForImageClassification, EtLinearPreTrainedModel): ...
