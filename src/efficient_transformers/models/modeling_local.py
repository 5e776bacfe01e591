r"""Local (truncated) attention: each token attends to its neighbours, in time proportional to the window.

.. math:: S(i) = \{j : |i-j| \le w\}, \qquad \text{causal: } 0 \le i-j \le w

The sliding window of Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 3.1), with the width counted on one
side: w here is half of the paper's w. L layers have a receptive field of L·w tokens on each side. O(n·w·d).
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
class EtLocalConfig(PatternConfig, EtConfig):
    """
    Args:
        window_size: tokens on each side that a token attends to, besides itself; one number, or one for each layer.
    """

    model_type = "et_local"

    window_size: int | list[int] = 128

    def validate_window(self):
        self.check_per_layer("window_size", 1, "it counts the neighbours read to each side")

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        return [AttentionPattern(window=self.per_layer("window_size", layer), causal=self.is_decoder)]


class EtLocalPreTrainedModel(EtPreTrainedModel):
    config: EtLocalConfig
    mixer_class = PatternAttention


class EtLocalModel(Backbone, EtLocalPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtLocalPreTrainedModel.model_class = EtLocalModel


class EtLocalForMaskedLM(ForMaskedLM, EtLocalPreTrainedModel): ...


class EtLocalForCausalLM(ForCausalLM, EtLocalPreTrainedModel, GenerationMixin): ...


class EtLocalForSequenceClassification(ForSequenceClassification, EtLocalPreTrainedModel): ...


class EtLocalForTokenClassification(ForTokenClassification, EtLocalPreTrainedModel): ...


class EtLocalForQuestionAnswering(ForQuestionAnswering, EtLocalPreTrainedModel): ...


class EtLocalForMultipleChoice(ForMultipleChoice, EtLocalPreTrainedModel): ...


class EtLocalForImageClassification(ForImageClassification, EtLocalPreTrainedModel): ...
