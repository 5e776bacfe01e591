"""Train a causal language model, new or from a checkpoint, evaluate it on the test split and save it for the Hub.

accelerate launch training/train.py --config configs/clm.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/clm-local [--max_length 512]
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ... import VARIANTS
from ..data.causal import CausalPacker, CausalWindow, CausalWindows
from ..data.packing import Windows, packed, special_frame
from ..engine.building import load_tokenizer
from ..engine.scoring import NextTokenScorer
from ..settings import InputError
from .language_models import LanguageModelSettings, LanguageModelTask, PerplexityScorer, cut


@dataclass
class ClmSettings(LanguageModelSettings):
    """Settings of causal language modelling; all are shared: see settings.py, texts.py and language_models.py."""


class CausalScorer(NextTokenScorer, PerplexityScorer):
    """Adds the loss per byte of text, which is comparable across tokenizers."""

    def scores(self, found: list[list[float]]) -> dict[str, float]:
        nats = math.fsum(loss for loss, *_ in found) / self.data.counts()["predicted_bytes"]
        return {**super().scores(found), "nats_per_byte": nats, "bits_per_byte": nats / math.log(2)}


def load_open_tokenizer(settings: ClmSettings, texts: list[str]) -> PreTrainedTokenizerBase:
    """Load a tokenizer with an end token that it does not append to texts.

    The packer adds the end token of a document, and the model predicts it. An encoder's tokenizer would append it to a
    prompt, which then could not be continued. Tokens that it adds before a text are kept.
    """
    tokenizer = load_tokenizer(settings, needs_padding=False)
    name = settings.tokenizer or settings.model["checkpoint"]
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"The tokenizer {name!r} does not report which bytes of a text a token represents: "
            f"{type(tokenizer).__name__} is not from the tokenizers library (a fast one). Use another tokenizer."
        )
    if tokenizer.eos_token_id is None:
        if tokenizer.sep_token_id is None:
            raise InputError(
                f"The tokenizer {name!r} has neither an end token nor a separator to place between documents: "
                "set its eos_token."
            )
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask marks padding, which is not predicted
    head, tail = special_frame(tokenizer, texts)
    if not len(tail):
        return tokenizer
    backend, tokens = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(head.tolist())
    backend.post_processor = TemplateProcessing(
        single=[*tokens, "$A"],
        pair=[*tokens, "$A", "$B:1"],
        special_tokens=list(zip(tokens, head.tolist(), strict=True)),
    )
    # not a model-specific class: those of BERT and RoBERTa add their end token again when loaded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
    )


@torch.no_grad()
def reads_ahead(model: PreTrainedModel, length: int = 32) -> bool:
    """Return True if later tokens change the logits of earlier ones."""
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    known = length // 2
    ids = torch.arange(length, device=model.device).repeat(2, 1) % model.config.vocab_size
    ids[1, known:] = (ids[1, known:] + 1) % model.config.vocab_size
    ours, theirs = model.eval()(ids).logits[:, :known].float()
    return not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * ours.std().item())


class ClmTask(LanguageModelTask[ClmSettings]):
    name = "pretrain_clm"
    settings_class = ClmSettings
    auto_class = AutoModelForCausalLM
    task_type = "text-generation"
    purpose = "A causal language model: `model.generate(**inputs, max_new_tokens=50)` continues a text."
    scorer = CausalScorer

    def load_tokenizer(self, settings: ClmSettings, texts: list[str]) -> PreTrainedTokenizerBase:
        return load_open_tokenizer(settings, texts)

    def build_model(
        self, settings: ClmSettings, config: PreTrainedConfig, tokenizer: Any, *, complete: bool = False
    ) -> PreTrainedModel:
        """Raise InputError unless the model predicts each token only from earlier ones."""
        causal = ", ".join(variant.model_type for variant in VARIANTS.values() if variant.causal)
        on_hub = getattr(config, "auto_map", None) or {}
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and AutoModelForCausalLM.__name__ not in on_hub:
            raise InputError(
                f"A {config.model_type} model has no head that predicts the next token: set model.model_type to "
                f"another ({causal}) or model.checkpoint to one of these, or task to pretrain_mlm."
            )
        is_encoder = getattr(config, "is_decoder", None) is False
        if is_encoder and "checkpoint" in settings.model:
            raise InputError(
                f"The checkpoint {settings.model['checkpoint']!r} is a bidirectional encoder: set --model.is_decoder "
                "true to convert its weights to a causal model, or model.checkpoint to a causal one."
            )
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id  # where `generate` stops
        if config.pad_token_id == config.eos_token_id:
            # some models never train the embedding of the padding token, but that of the end token must be trained
            config.pad_token_id = None
        model = super().build_model(settings, config, tokenizer, complete=complete)
        if reads_ahead(model):
            remedy = "is_decoder true" if is_encoder else f"model_type to a causal one, e.g. {causal}"
            raise InputError(
                f"A {config.model_type} model attends to the tokens that it should predict: set --model.{remedy}, or "
                "set task to pretrain_mlm."
            )
        return model

    def make_windows(
        self, name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, settings: ClmSettings
    ) -> Windows:
        pack = CausalPacker(tokenizer, max_length, settings.packing, settings.shortest_window)
        how = {"kind": "causal", "max_length": max_length}
        windows, coverage = cut(pack, CausalWindow, texts, tokenizer, settings, how)
        data = CausalWindows(windows)
        data.coverage = coverage
        if not data.predicted_bytes:
            raise InputError(
                f"The {name} data contains no text that could be predicted: the first token of a window is not."
            )
        return packed(data, max_length, settings.packing)

    def describe(self, settings: ClmSettings, metrics: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        test = metrics["test"]
        return {"documents": "each with its end token, which is predicted as well"}, [
            "Loss and perplexity are per token and comparable only between models with the same tokenizer. Nats and "
            "bits per byte are comparable between all models on the same text: the loss of all "
            f"{test['predicted_tokens']:,} predicted tokens divided by their {test['predicted_bytes']:,} UTF-8 bytes.",
            "A token is predicted from the earlier ones in its window, and the first one of a window is not predicted: "
            "the scores depend on the length of the windows.",
            "The results are from a single seed; they vary somewhat with the seed.",
        ]


TASK = ClmTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
