r"""Random Feature Attention: the Gaussian kernel by sines and cosines (Peng et al. 2021, arXiv:2103.02143).

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
          \phi(x) = \sqrt{1/D}\,[\sin(w_1 \cdot x), \dots, \sin(w_D \cdot x),
                                 \cos(w_1 \cdot x), \dots, \cos(w_D \cdot x)]

Queries and keys have norm 1, and w = σ∘w̃ with w̃ ~ N(0, I) drawn once and learned σ: :math:`\phi(q)\cdot\phi(k)`
estimates :math:`\exp(-\|\sigma \circ (q - k)\|^2/2)`, for σ = 1 a multiple of :math:`\exp(q\cdot k)` (section 3.1).
A decoder may have a gate (section 3.2): :math:`S_t = g_t S_{t-1} + (1 - g_t)\,\phi(k_t) v_t^\top`, and the
normalizer likewise, with :math:`g_t = \mathrm{sigmoid}(w_g \cdot x_t + b_g)` for each head. O(n·D·d).

*Paper*: the divisor has no lower bound; here, where the features cancel, it is a tenth of the number of keys.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
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
class EtRfaConfig(RandomFeatureConfig, EtConfig):
    """
    Args:
        num_random_features: D, sines and as many cosines per head.
        gated: has the decoder a recency gate? An encoder cannot: the gate depends on the order of the tokens.
        feature_seed: of the random features.
        feature_redraw_interval: forward passes in training after which they are drawn again; None never does.
    """

    model_type = "et_rfa"

    num_random_features: int = 64
    gated: bool = False
    feature_seed: int = 0
    feature_redraw_interval: int | None = None

    @property
    def features(self) -> FeatureMap:
        return FEATURE_MAPS["trigonometric"]


class EtRfaAttention(RandomFeatureAttention):
    def __init__(self, config: EtRfaConfig, layer: int):
        super().__init__(config, layer)
        self.scale = nn.Parameter(torch.ones(self.num_heads, 1, self.head_dim))
        if config.gated and not config.is_decoder:
            raise ValueError("gated=True needs a causal model, for the gate forgets the past: set is_decoder=True.")
        self.gate_proj = nn.Linear(config.hidden_size, self.num_heads) if config.gated else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.ones_(self.scale)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (F.normalize(x, dim=-1) * self.scale for x in (q, k))
        return q, k

    def log_decay(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        if self.gate_proj is None:
            return None
        gate = F.logsigmoid(self.gate_proj(hidden)).transpose(1, 2)
        return gate if padding_mask is None else gate * padding_mask[:, None]


class EtRfaPreTrainedModel(EtPreTrainedModel):
    config: EtRfaConfig
    mixer_class = EtRfaAttention
    _is_stateful = True
    _supports_flex_attn = False


class EtRfaModel(Backbone, EtRfaPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtRfaPreTrainedModel.model_class = EtRfaModel


class EtRfaForMaskedLM(ForMaskedLM, EtRfaPreTrainedModel): ...


class EtRfaForCausalLM(ForCausalLM, EtRfaPreTrainedModel, GenerationMixin): ...


class EtRfaForSequenceClassification(ForSequenceClassification, EtRfaPreTrainedModel): ...


class EtRfaForTokenClassification(ForTokenClassification, EtRfaPreTrainedModel): ...


class EtRfaForQuestionAnswering(ForQuestionAnswering, EtRfaPreTrainedModel): ...


class EtRfaForMultipleChoice(ForMultipleChoice, EtRfaPreTrainedModel): ...


class EtRfaForImageClassification(ForImageClassification, EtRfaPreTrainedModel): ...
