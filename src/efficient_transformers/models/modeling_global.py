r"""Global attention: a few tokens attend to everything and everything attends to them.

.. math:: S(i) = \{0, \dots, n-1\} \text{ for } i \in G, \qquad S(i) = G \cup \{i\} \text{ otherwise}

The global tokens of Longformer and ETC (Beltagy et al. 2020, arXiv:2004.05150, section 3.1; Ainslie et al. 2020,
arXiv:2004.08483, section 3.2) on their own. `internal`: tokens of the sequence, the first ones or those the caller
marks in `global_attention_mask`. `external`: learned embeddings before the first token, removed from the output.
O(n·g·d).
"""

from typing import Literal

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
from .ops_checks import check_at_least
from .ops_patterns import AttentionPattern


@strict
class EtGlobalConfig(PatternConfig, EtConfig):
    """
    Args:
        num_global_tokens: how many global tokens there are; for `internal` ones the first of the sequence, to which
            `global_attention_mask` adds.
        global_token_type: `internal` or `external`. A causal model has internal ones: tokens
            that attend both ways would leak the future. There, attention to and from global tokens is causal.
    """

    model_type = "et_global"

    num_global_tokens: int = 2
    global_token_type: Literal["internal", "external"] = "internal"

    def validate_tokens(self):
        minimum = 0 if self.global_token_type == "internal" else 1
        check_at_least("num_global_tokens", self.num_global_tokens, minimum, "external tokens are all there are")
        if self.global_token_type == "external" and self.is_decoder:
            raise ValueError(
                "global_token_type 'external' cannot be causal: an external token reads the whole sequence; "
                "use 'internal' for a decoder."
            )

    @property
    def num_external_tokens(self) -> int:
        return self.num_global_tokens if self.global_token_type == "external" else 0

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        return [AttentionPattern(global_tokens=tuple(range(self.num_global_tokens)), causal=self.is_decoder)]


class EtGlobalPreTrainedModel(EtPreTrainedModel):
    config: EtGlobalConfig
    mixer_class = PatternAttention


class EtGlobalModel(Backbone, EtGlobalPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""

    has_marked_tokens = True


EtGlobalPreTrainedModel.model_class = EtGlobalModel


class EtGlobalForMaskedLM(ForMaskedLM, EtGlobalPreTrainedModel): ...


class EtGlobalForCausalLM(ForCausalLM, EtGlobalPreTrainedModel, GenerationMixin): ...


class EtGlobalForSequenceClassification(ForSequenceClassification, EtGlobalPreTrainedModel): ...


class EtGlobalForTokenClassification(ForTokenClassification, EtGlobalPreTrainedModel): ...


class EtGlobalForQuestionAnswering(ForQuestionAnswering, EtGlobalPreTrainedModel): ...


class EtGlobalForMultipleChoice(ForMultipleChoice, EtGlobalPreTrainedModel): ...


class EtGlobalForImageClassification(ForImageClassification, EtGlobalPreTrainedModel): ...
