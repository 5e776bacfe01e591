"""All heads. A variant derives each of them together with its pretrained base, whose `model_class` they build."""

from .base_heads_classification import (
    ForImageClassification,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_heads_language import ForCausalLM, ForMaskedLM

__all__ = [
    "ForCausalLM",
    "ForImageClassification",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
]
