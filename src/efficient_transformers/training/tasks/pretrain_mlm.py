"""Trains a masked language model, new or from a checkpoint, evaluates it on the test split and saves it for the Hub.

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
    """The settings of this script; the shared ones are in settings.py, texts.py and language_models.py."""

    # share of a window's tokens, or words, that are to be predicted
    mlm_probability: float = ranged(0.15, above=0, below=1)
    whole_word: bool = False  # mask all tokens of a word or none
    mask_token: str | None = None  # added to a tokenizer that has none, e.g. "[MASK]"
    frequency_bias: bool = False  # a new model begins by guessing tokens as often as they occur: for short trainings

    def check(self) -> None:
        super().check()
        if self.frequency_bias and self.streaming:
            raise InputError("frequency_bias is counted in all the training text: leave it out with streaming.")


class MlmTask(LanguageModelTask[MlmSettings]):
    name = "pretrain_mlm"
    settings_class = MlmSettings
    auto_class = AutoModelForMaskedLM
    task_type = "fill-mask"
    purpose = "A masked language model, which can be trained on for other tasks."

    def load_tokenizer(self, settings: MlmSettings, texts: list[str]) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(settings)
        if tokenizer.mask_token_id is None and not settings.mask_token:
            raise InputError(
                f"The tokenizer {settings.tokenizer or settings.model['checkpoint']!r} has no mask token: take another "
                "one, or have one added, and a row to the model's embeddings, by mask_token, e.g. mask_token='[MASK]'."
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
        """Packed and masked: new masks in every epoch of training, the same ones in every evaluation and run."""
        pack = Packer(tokenizer, max_length, settings.packing, settings.shortest_window, settings.whole_word)
        how = {"kind": "masked", "max_length": max_length, "whole_word": settings.whole_word}
        windows, coverage = cut(pack, Window, texts, tokenizer, settings, how)
        if not windows:
            raise InputError(f"The {name} data holds no token that could be masked.")
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
                raise InputError("frequency_bias is the start of a new model: leave it out with model.checkpoint.")
            start_at_frequencies(model, data)

    def describe(self, settings: MlmSettings, metrics: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        masked, unit = metrics["test"]["masked_tokens"], "words" if settings.whole_word else "tokens"
        rows = {
            "masks": f"{100 * settings.mlm_probability:g} % of the {unit}, new in every epoch; of these 80 % the mask "
            "token, 10 % a random one, 10 % unchanged"
        }
        return rows, [
            "Loss and perplexity are of masked tokens, with the text on both sides in sight: they compare only with "
            "those of models that have the same tokenizer and the same share of masks.",
            f"The results are of one seed and {masked:,} masked tokens; another seed gives somewhat different ones.",
        ]


def add_mask_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: MlmSettings) -> None:
    """Where the tokenizer has none. The vocabulary grows only if the model has no row to spare."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": str(settings.mask_token)})
        if len(tokenizer) > model.config.vocab_size:
            # the mean of trained embeddings is a better start than a draw; the rows of a new model are all drawn
            model.resize_token_embeddings(len(tokenizer), mean_resizing="checkpoint" in settings.model)


@torch.no_grad()
def start_at_frequencies(model: PreTrainedModel, windows: Windows) -> None:
    """Sets the output bias to the logarithm of how often each token occurs.

    The loss then begins at that of a guess by frequency, which a small model takes a hundred steps and more to find.
    """
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is None:
        raise InputError(f"frequency_bias needs an output bias, and a {model.config.model_type} model has none.")
    counts = np.full(len(bias), 0.01)  # a token that does not occur is unlikely, but not impossible
    for index in range(len(windows)):
        window = windows[index]
        ids = np.where(window["labels"] == IGNORED, window["input_ids"], window["labels"])
        counts += np.bincount(ids, minlength=len(bias))
    bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


TASK = MlmTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
