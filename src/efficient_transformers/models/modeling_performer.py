r"""Performer: softmax attention by positive random features, FAVOR+ (Choromanski et al. 2020, arXiv:2009.14794).

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
          \phi(x) = \frac{\exp(-\|x\|^2/2)}{\sqrt m}\,[\exp(w_1 \cdot x), \dots, \exp(w_m \cdot x)]

for x = q or k over :math:`d^{1/4}` (lemma 1, section 2.3). The w are N(0, I), orthogonal in blocks of d (section 2.4),
and drawn again now and then in training, so that no layer learns to live with the errors of one draw (section 4.2).
`kernel="relu"` takes max(w·x, 0) instead of exp (section 2.2), which estimates another kernel. O(n·m·d).
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor
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
from .base_kernel_attention import RandomFeatureAttention, RandomFeatureConfig
from .base_pretrained import EtPreTrainedModel
from .ops_feature_maps import FEATURE_MAPS, FeatureMap


@strict
class EtPerformerConfig(RandomFeatureConfig, EtConfig):
    """
    Args:
        num_random_features: m, per head; the error of the estimate falls as 1/√m.
        kernel: `softmax`, or `relu` for a kernel of its own.
        feature_seed: of the random features.
        feature_redraw_interval: forward passes in training after which they are drawn again; None never does.
    """

    model_type = "et_performer"
    orthogonal = True

    num_random_features: int = 256
    kernel: Literal["softmax", "relu"] = "softmax"
    feature_seed: int = 0
    feature_redraw_interval: int | None = 1000

    @property
    def features(self) -> FeatureMap:
        return FEATURE_MAPS["positive" if self.kernel == "softmax" else "relu"]


class EtPerformerAttention(RandomFeatureAttention):
    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.head_dim**-0.25
        return q * scale, k * scale


class EtPerformerPreTrainedModel(EtPreTrainedModel):
    config: EtPerformerConfig
    mixer_class = EtPerformerAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtPerformerModel(Backbone, EtPerformerPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtPerformerPreTrainedModel.model_class = EtPerformerModel


class EtPerformerForMaskedLM(ForMaskedLM, EtPerformerPreTrainedModel): ...


class EtPerformerForCausalLM(ForCausalLM, EtPerformerPreTrainedModel, GenerationMixin): ...


class EtPerformerForSequenceClassification(ForSequenceClassification, EtPerformerPreTrainedModel): ...


class EtPerformerForTokenClassification(ForTokenClassification, EtPerformerPreTrainedModel): ...


class EtPerformerForQuestionAnswering(ForQuestionAnswering, EtPerformerPreTrainedModel): ...


class EtPerformerForMultipleChoice(ForMultipleChoice, EtPerformerPreTrainedModel): ...


class EtPerformerForImageClassification(ForImageClassification, EtPerformerPreTrainedModel): ...
