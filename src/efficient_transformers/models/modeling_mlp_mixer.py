r"""MLP-Mixer: an MLP over the positions, the same for all features, instead of attention (arXiv:2105.01601).

.. math:: Y = W_2\, \sigma(W_1 X + b_1) + b_2, \qquad W_1 \in \mathbb R^{s \times n},\; W_2 \in \mathbb R^{n \times s}

Tolstikhin et al. 2021, eq. 1, before the MLP over the features. Its weights do not depend on the input; W₂ is
initialised near 0, so that positions are hardly mixed at first. O(n·s·e). The weights have an entry for each of the
`max_position_embeddings` positions, and shorter sequences use the first ones; in the paper, all have the same length.
"""

from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .base_backbone import Backbone
from .base_configuration import ENCODER_HEADS, EtConfig
from .base_heads import (
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_mixer import Mixer, SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least
from .ops_tracing import first_positions


@strict
class EtMlpMixerConfig(EtConfig):
    """
    Args:
        token_mixing_size: s, width of the MLP over the positions.
        position_embedding_type: `none` by default, as in the paper: the weights tell the positions apart.
    """

    model_type = "et_mlp_mixer"
    heads: ClassVar[tuple[str, ...]] = ENCODER_HEADS
    attends: ClassVar[bool] = False

    token_mixing_size: int = 256
    position_embedding_type: Literal["learned", "sinusoidal", "rotary", "none"] = "none"

    def validate_token_mixing(self):
        check_at_least("token_mixing_size", self.token_mixing_size, 1, "all that tokens read goes through it")
        if self.is_decoder:
            raise ValueError("MLP-Mixer cannot be causal: its hidden layer reads all tokens; set is_decoder=False.")


class TokenMixer(Mixer):
    position_axes = {"reading_weight": (1,), "writing_weight": (0,), "writing_bias": (0,)}
    summed_axes = {"reading_weight": (1,)}

    def __init__(self, config: EtMlpMixerConfig, layer: int):
        super().__init__()
        config.validate_token_mixing()  # is_decoder may have been set since the config was made
        self.config = config
        length, size = config.max_position_embeddings, config.token_mixing_size
        self.reading_weight = nn.Parameter(torch.empty(size, length))  # W₁
        self.reading_bias = nn.Parameter(torch.empty(size))
        self.activation = ACT2FN[config.hidden_act]
        self.writing_weight = nn.Parameter(torch.empty(length, size))  # W₂
        self.writing_bias = nn.Parameter(torch.empty(length))

    def reset_parameters(self) -> None:
        length, size = self.writing_weight.shape
        init.normal_(self.reading_weight, std=length**-0.5)
        init.normal_(self.writing_weight, std=self.config.initializer_range * size**-0.5)
        init.zeros_(self.reading_bias)
        init.zeros_(self.writing_bias)

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, None]:
        """(b, n, e) -> (b, n, e)."""
        length = hidden.shape[1]
        if sequence.padding_mask is not None:
            hidden = hidden * sequence.padding_mask[..., None]
        read = first_positions(self.reading_weight, length, 1) @ hidden + self.reading_bias[:, None]  # (b, s, e)
        weight, bias = (first_positions(x, length, 0) for x in (self.writing_weight, self.writing_bias))
        return weight @ self.activation(read) + bias[:, None], None


class EtMlpMixerPreTrainedModel(EtPreTrainedModel):
    config: EtMlpMixerConfig
    mixer_class = TokenMixer
    _supports_flex_attn = False


class EtMlpMixerModel(Backbone, EtMlpMixerPreTrainedModel):
    """Bare encoder."""


EtMlpMixerPreTrainedModel.model_class = EtMlpMixerModel


class EtMlpMixerForMaskedLM(ForMaskedLM, EtMlpMixerPreTrainedModel): ...


class EtMlpMixerForSequenceClassification(ForSequenceClassification, EtMlpMixerPreTrainedModel): ...


class EtMlpMixerForTokenClassification(ForTokenClassification, EtMlpMixerPreTrainedModel): ...


class EtMlpMixerForQuestionAnswering(ForQuestionAnswering, EtMlpMixerPreTrainedModel): ...


class EtMlpMixerForMultipleChoice(ForMultipleChoice, EtMlpMixerPreTrainedModel): ...


class EtMlpMixerForImageClassification(ForImageClassification, EtMlpMixerPreTrainedModel): ...
