"""Train a masked language model, new or from a checkpoint, evaluate it on the test split and save it for the Hub.

accelerate launch training/train.py --config configs/mlm.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/mlm-local [--max_length 512]
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.masking import MaskedWindows, Masker, RemaskedWindows
from ..data.packing import IGNORED, Packer, Window, Windows, packed
from ..engine.building import load_tokenizer
from ..settings import InputError, ranged
from .language_models import LanguageModelSettings, LanguageModelTask, cut


@dataclass
class MlmSettings(LanguageModelSettings):
    """Settings of masked language modelling; the shared ones are in settings.py, texts.py and language_models.py."""

    # share of a window's tokens, or words, to predict
    mlm_probability: float = ranged(0.15, above=0, below=1)
    whole_word: bool = False  # mask all tokens of a word or none
    mask_token: str | None = None  # added to a tokenizer without one, e.g. "[MASK]"
    frequency_bias: bool = False  # initialise a new model to predict token frequencies: for short trainings

    def check(self) -> None:
        super().check()
        if self.frequency_bias and self.streaming:
            raise InputError("frequency_bias is computed from all training texts: omit it with streaming.")


class MlmTask(LanguageModelTask[MlmSettings]):
    name = "pretrain_mlm"
    settings_class = MlmSettings
    auto_class = AutoModelForMaskedLM
    task_type = "fill-mask"
    purpose = "A masked language model, which can be fine-tuned for other tasks."

    def load_tokenizer(self, settings: MlmSettings, texts: list[str]) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(settings)
        if tokenizer.mask_token_id is None and not settings.mask_token:
            raise InputError(
                f"The tokenizer {settings.tokenizer or settings.model['checkpoint']!r} has no mask token: use another "
                "one, or set mask_token, e.g. '[MASK]', to add one, with a row in the model's embeddings."
            )
        return tokenizer

    def build_model(
        self, settings: MlmSettings, config: PreTrainedConfig, tokenizer: Any, *, complete: bool = False
    ) -> PreTrainedModel:
        model = super().build_model(settings, config, tokenizer, complete=complete)
        add_mask_token(tokenizer, model, settings)
        return model

    def make_windows(
        self, name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, settings: MlmSettings
    ) -> Windows:
        """Packed and masked windows: masks change in every epoch of training, and are the same in every evaluation."""
        pack = Packer(tokenizer, max_length, settings.packing, settings.shortest_window, settings.whole_word)
        how = {"kind": "masked", "max_length": max_length, "whole_word": settings.whole_word}
        windows, coverage = cut(pack, Window, texts, tokenizer, settings, how)
        if not windows:
            raise InputError(f"The {name} data contains no token that could be masked.")
        masker = Masker.of(tokenizer, settings.mlm_probability)
        masked: Windows = (
            RemaskedWindows(windows, masker, settings.seed)
            if name == "train"
            else MaskedWindows(windows, masker, settings.split_seed)
        )
        masked.coverage = coverage
        return packed(masked, max_length, settings.packing)

    def start(self, settings: MlmSettings, model: PreTrainedModel, data: Windows) -> None:
        if settings.frequency_bias:
            if "checkpoint" in settings.model:
                raise InputError("frequency_bias initialises a new model: omit it with model.checkpoint.")
            start_at_frequencies(model, data)

    def describe(self, settings: MlmSettings, metrics: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        masked, unit = metrics["test"]["masked_tokens"], "words" if settings.whole_word else "tokens"
        rows = {
            "masks": f"{100 * settings.mlm_probability:g} % of the {unit}, new in every epoch; of these 80 % become "
            "the mask token, 10 % a random one, 10 % stay unchanged"
        }
        return rows, [
            "Loss and perplexity are those of masked tokens, given the text on both sides: they are comparable only "
            "between models with the same tokenizer and the same share of masked tokens.",
            f"The results are from a single seed and {masked:,} masked tokens; they vary somewhat with the seed.",
        ]


def add_mask_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: MlmSettings) -> None:
    """Add a mask token if the tokenizer has none. The vocabulary grows only if the model has no unused row."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": str(settings.mask_token)})
        if len(tokenizer) > model.config.vocab_size:
            # new rows start at the mean of trained embeddings; those of a new model are all drawn
            model.resize_token_embeddings(len(tokenizer), mean_resizing="checkpoint" in settings.model)


@torch.no_grad()
def start_at_frequencies(model: PreTrainedModel, windows: Windows) -> None:
    """Set the output bias to the log frequency of each token.

    The initial loss is then that of predicting frequencies, which a small model needs a hundred or more steps to learn.
    """
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is None:
        raise InputError(f"frequency_bias needs an output bias, but a {model.config.model_type} model has none.")
    counts = np.full(len(bias), 0.01)  # absent tokens are unlikely, but not impossible
    for index in range(len(windows)):
        window = windows[index]
        ids = np.where(window["labels"] == IGNORED, window["input_ids"], window["labels"])
        counts += np.bincount(ids, minlength=len(bias))
    bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


TASK = MlmTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
