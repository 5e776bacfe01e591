r"""FNet: a Fourier transform instead of attention, without parameters (Lee-Thorp et al. 2021, arXiv:2105.03824).

.. math:: y = \mathrm{Re}\big(\mathcal F_{\mathrm{seq}}(\mathcal F_{\mathrm{hidden}}(x))\big)

Section 3.2, eq. 3. Every token attends to every other one, O(n·log n·e). Each sequence is transformed at its own true
length, so that padding changes nothing; the authors' code transforms it together with its padding.

The transform is not normalised, as in the paper: its values are about √(n·e) times as large as the input's. For long
sequences, they may exceed the range of float16, but not that of bfloat16 or float32.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

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
from .ops_fourier import fourier_mix, fourier_mix_chirp, fourier_mix_dense


@strict
class EtFnetConfig(EtConfig):
    """
    Args:
        embedding_projection: a dense layer after the embeddings, as in the published checkpoints.
        norm_first: False by default, as in the paper.
    """

    model_type = "et_fnet"
    heads: ClassVar[tuple[str, ...]] = ENCODER_HEADS
    attends: ClassVar[bool] = False

    embedding_projection: bool = False
    norm_first: bool = False

    def validate_direction(self):
        if self.is_decoder:
            raise ValueError("FNet cannot be causal: every frequency reads all tokens; set is_decoder=False.")


class FourierMixer(Mixer):
    """Fourier mixing; `attn_implementation="eager"` materialises the matrices of the transform.

    The block's dropout is applied after it as well; in the paper only after the feed-forward.
    """

    def __init__(self, config: EtFnetConfig, layer: int):
        super().__init__()
        config.validate_direction()  # is_decoder may have been set since the config was made
        self.config = config

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, None]:
        """(b, n, e) -> (b, n, e)."""
        padding_mask = sequence.padding_mask
        if self.config._attn_implementation == "eager" or torch.onnx.is_in_onnx_export():  # no complex numbers there
            real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if padding_mask is None else padding_mask
            return fourier_mix_dense(hidden, real), None
        if padding_mask is not None and sequence.lengths is None:
            return fourier_mix_chirp(hidden, padding_mask), None
        return fourier_mix(hidden, sequence.lengths), None


class EtFnetPreTrainedModel(EtPreTrainedModel):
    config: EtFnetConfig
    mixer_class = FourierMixer
    _supports_flex_attn = False


class EtFnetModel(Backbone, EtFnetPreTrainedModel):
    """Bare encoder."""


EtFnetPreTrainedModel.model_class = EtFnetModel


class EtFnetForMaskedLM(ForMaskedLM, EtFnetPreTrainedModel): ...


class EtFnetForSequenceClassification(ForSequenceClassification, EtFnetPreTrainedModel): ...


class EtFnetForTokenClassification(ForTokenClassification, EtFnetPreTrainedModel): ...


class EtFnetForQuestionAnswering(ForQuestionAnswering, EtFnetPreTrainedModel): ...


class EtFnetForMultipleChoice(ForMultipleChoice, EtFnetPreTrainedModel): ...


class EtFnetForImageClassification(ForImageClassification, EtFnetPreTrainedModel): ...
