"""Prepare a tokenizer for the folder of the model that it is saved with."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import LARGE_INTEGER, PreTrainedTokenizerBase

from .models.configuration import EtConfig

# arguments of `from_pretrained` and of an earlier encoding, which transformers would save with the tokenizer
NOT_SAVED = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")


def fit_tokenizer(tokenizer: Any, config: PreTrainedConfig, max_length: int | None = None) -> None:
    """Set `model_max_length`, in tokens, to what the model of `config` takes, in place.

    Pipelines truncate and divide long texts by it. A variant takes `max_position_embeddings` tokens; for another model
    `max_length` is used if the tokenizer has no limit of its own. Arguments of earlier calls are not saved with it.
    """
    if isinstance(config, EtConfig):
        tokenizer.model_max_length = config.max_position_embeddings
    elif max_length is not None and tokenizer.model_max_length > LARGE_INTEGER:
        tokenizer.model_max_length = max_length
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        for name in NOT_SAVED:
            tokenizer.init_kwargs.pop(name, None)
