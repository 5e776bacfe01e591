"""Mixed heads: the heads of a layer have different patterns.

Local, strided and global heads complement each other, like the two heads of the Sparse Transformer (Child et al. 2019,
arXiv:1904.10509, section 4.2). Heads with the same pattern are computed together; the cost is the mean over the heads.
"""

from dataclasses import field

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
from .ops_patterns import AttentionPattern, parse_pattern


@strict
class EtMixedConfig(PatternConfig, EtConfig):
    """
    Args:
        head_patterns: one description per head, or a shorter list that is tiled over them: `local:<window>`,
            `stride:<stride>[:<hops>]`, `global:<tokens>`, `random:<blocks>[:<block size>]`, `full`, united by `|`.
            Random blocks are drawn separately for each layer and head.
        pattern_seed: of the random blocks.
    """

    model_type = "et_mixed"

    head_patterns: list[str] = field(default_factory=lambda: ["local:128", "stride:64:2", "global:2", "local:32"])
    pattern_seed: int = 0

    def validate_patterns(self):
        if not self.head_patterns or self.num_attention_heads % len(self.head_patterns):
            raise ValueError(
                f"head_patterns has {len(self.head_patterns)} entries, which cannot be tiled over "
                f"num_attention_heads ({self.num_attention_heads}): give one per head, or a divisor of them."
            )
        self.attention_patterns(0)

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        seed = self.layer_seed(layer)
        return [parse_pattern(text, seed=seed, causal=self.is_decoder) for text in self.head_patterns]


class EtMixedPreTrainedModel(EtPreTrainedModel):
    config: EtMixedConfig
    mixer_class = PatternAttention


class EtMixedModel(Backbone, EtMixedPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtMixedPreTrainedModel.model_class = EtMixedModel


class EtMixedForMaskedLM(ForMaskedLM, EtMixedPreTrainedModel): ...


class EtMixedForCausalLM(ForCausalLM, EtMixedPreTrainedModel, GenerationMixin): ...


class EtMixedForSequenceClassification(ForSequenceClassification, EtMixedPreTrainedModel): ...


class EtMixedForTokenClassification(ForTokenClassification, EtMixedPreTrainedModel): ...


class EtMixedForQuestionAnswering(ForQuestionAnswering, EtMixedPreTrainedModel): ...


class EtMixedForMultipleChoice(ForMultipleChoice, EtMixedPreTrainedModel): ...


class EtMixedForImageClassification(ForImageClassification, EtMixedPreTrainedModel): ...
