"""Settings of short runs of language models, and the tokenizers that they are tested with."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from training_runs import TINY_LANGUAGE, bpe, wordpiece
from transformers import PreTrainedTokenizerFast

from efficient_transformers.training.tasks.pretrain_clm import ClmSettings
from efficient_transformers.training.tasks.pretrain_mlm import MlmSettings

TINY_MLM = {**TINY_LANGUAGE, "task": "pretrain_mlm", "whole_word": True}  # 52 windows: 13 batches and 7 steps an epoch


TOKENIZERS = {"bpe": bpe, "wordpiece": wordpiece}
both_tokenizers = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)


def mlm_settings(**values):
    return MlmSettings.from_dict({**TINY_MLM, "data": "era", "model": {"model_type": "bert"}, **values})


TINY_CLM = {**TINY_LANGUAGE, "task": "pretrain_clm", "model": {**TINY_LANGUAGE["model"], "window_size": 8}}


def clm_settings(**values):
    return ClmSettings.from_dict({**TINY_CLM, "data": "era", "out": "unused", **values})


def byte_level(*merges, normalizer=None, add_prefix_space=False, trim_offsets=False):
    """A byte-level BPE whose tokens are single bytes, but for these merges; it adds nothing to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(left + right for left, right in merges), "<|end|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
