"""Trains a masked language model, new or from a checkpoint, evaluates it on the test split and saves it for the Hub.

accelerate launch training/pretrain_mlm.py --config configs/mlm/local.yaml [key=value …] [--resume]
python training/pretrain_mlm.py --evaluate runs/mlm-local [max_length=512]
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from building import build_config, build_model, load_tokenizer, make_accelerator, model_facts, visible_length
from command_line import command_line, finished_settings
from huggingface_hub import ModelCard
from loop import make_loader, train
from masking import IGNORED, MaskedWindows, Masker, RemaskedWindows
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from packing import Packer, Packing
from reporting import about, make_card, report
from settings import InputError
from texts import TextSettings, load_texts
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

AUTO_CLASS = "AutoModelForMaskedLM"
SCORES = ("loss", "perplexity", "accuracy")


@dataclass
class MlmSettings(TextSettings):
    """The settings of this script; the shared ones are in settings.py and texts.py."""

    packing: Packing = "documents"  # joins documents and cuts full windows; padding: each of one document, and padded
    shortest_window: int = 64  # with padding: a shorter rest of a document is dropped, unless it is the only window
    mlm_probability: float = 0.15  # share of a window's tokens, or words, that are to be predicted
    whole_word: bool = False  # mask all tokens of a word or none
    mask_token: str | None = None  # added to a tokenizer that has none, e.g. "[MASK]"

    def check(self) -> None:
        super().check()
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"mlm_probability ({self.mlm_probability}) must lie between 0 and 1.")
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss (it orders as perplexity) or accuracy.")


class Evaluator:
    """Loss and accuracy at the masked tokens of one split, each token counting the same, over all processes."""

    def __init__(self, accelerator: Accelerator, data: MaskedWindows, collate: Any, settings: MlmSettings):
        self.accelerator = accelerator
        self.loader = accelerator.prepare(make_loader(data, collate, settings.eval_batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)  # loss, right ones, masked tokens
        for batch in self.loader:
            labels = batch.pop("labels")
            logits = model(**batch).logits
            masked = labels != IGNORED
            logits, targets = logits[masked].float(), labels[masked]
            of_token = [cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets, targets >= 0]
            sums = torch.zeros(*labels.shape, 3, device=labels.device)
            sums[masked] = torch.stack([values.float() for values in of_token], -1)
            # sums of each window, and no logits, are gathered: what fills up the last batch is known by its window
            gathered: Any = self.accelerator.gather_for_metrics(sums.sum(1))
            totals += gathered.cpu().double().sum(0)
        loss, right, count = totals.tolist()
        # past e^709 a float ends; a model that has diverged so far is told by its loss
        return {"loss": loss / count, "perplexity": math.exp(min(loss / count, 709)), "accuracy": right / count}


def run(settings: MlmSettings, command: str = "") -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
    accelerator = make_accelerator(settings)
    if (finished := finished_metrics(accelerator, settings)) is not None:
        return finished

    tokenizer = load_tokenizer(settings)
    check_mask_token(tokenizer, settings)
    texts = load_texts(settings)
    config = build_config(settings, tokenizer)
    max_length = visible_length(settings, config)
    set_seed(settings.seed)
    model = build_model(settings, config, AutoModelForMaskedLM)
    add_mask_token(tokenizer, model, settings)
    data = {name: masked_windows(name, split, tokenizer, max_length, settings) for name, split in texts.items()}
    facts = model_facts(model, max_length)
    collate = DataCollatorForTokenClassification(tokenizer)
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    lengths = [len(window.ids) for window in data["train"].windows]
    accelerator.print(
        f"{config.model_type}, {facts['parameters']:,} parameters; {len(lengths)} / {len(data['validation'])} / "
        f"{len(data['test'])} windows of up to {max_length} tokens; {hardware(accelerator)}"
    )
    trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
    scores = {
        name: {**values, "n": len(data[name]), "masked_tokens": data[name].masked_tokens()}
        for name, values in (("test", test(trained)), ("validation", progress.best_scores))
    }
    metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores)
    finish_folder(accelerator, settings, trained, tokenizer, card(settings, metrics, about(model), command), metrics)
    report(accelerator, settings, metrics, AUTO_CLASS, shown(metrics))
    return metrics


def check_mask_token(tokenizer: PreTrainedTokenizerBase, settings: MlmSettings) -> None:
    if tokenizer.mask_token_id is None and not settings.mask_token:
        raise InputError(
            f"The tokenizer {settings.tokenizer or settings.model['checkpoint']!r} has no mask token: take another "
            "one, or have one added, and a row to the model's embeddings, by mask_token, e.g. mask_token='[MASK]'."
        )


def add_mask_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: MlmSettings) -> None:
    """Where the tokenizer has none. The vocabulary grows only if the model has no row to spare."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": str(settings.mask_token)})
        if len(tokenizer) > model.config.vocab_size:
            # the mean of trained embeddings is a better start than a draw; the rows of a new model are all drawn
            model.resize_token_embeddings(len(tokenizer), mean_resizing="checkpoint" in settings.model)


def masked_windows(
    name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, settings: MlmSettings
) -> MaskedWindows:
    """A split, packed and masked: new masks in every epoch of training, the same ones in every evaluation and run."""
    pack = Packer(tokenizer, max_length, settings.packing, settings.shortest_window, settings.whole_word)
    windows = pack(texts)
    if not windows:
        raise InputError(f"The {name} data holds no token that could be masked.")
    masker = Masker.of(tokenizer, settings.mlm_probability)
    if name == "train":
        return RemaskedWindows(windows, masker, settings.seed)
    return MaskedWindows(windows, masker, settings.split_seed)


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: metrics["test"][key] for key in SCORES}


def card(settings: MlmSettings, metrics: dict[str, Any], description: str, command: str) -> ModelCard:
    masked, unit = metrics["test"]["masked_tokens"], "words" if settings.whole_word else "tokens"
    full = settings.packing == "documents"
    return make_card(
        settings,
        metrics,
        command or "accelerate launch training/pretrain_mlm.py --config settings.yaml",
        task_type="fill-mask",
        auto_class=AUTO_CLASS,
        description=f"{description}\n\nA masked language model, which can be trained on for other tasks.",
        shown=shown(metrics),
        unit=f"windows of {'' if full else 'up to '}{metrics['model']['max_length']:,} tokens",
        training_rows={
            "windows": "documents joined and cut, without padding" if full else "of one document each, padded",
            "masks": f"{100 * settings.mlm_probability:g} % of the {unit}, new in every epoch; of these 80 % the mask "
            "token, 10 % a random one, 10 % unchanged",
        },
        limits=[
            "Loss and perplexity are of masked tokens, with the text on both sides in sight: they compare only with "
            "those of models that have the same tokenizer and the same share of masks.",
            f"The results are of one seed and {masked:,} masked tokens; another seed gives somewhat different ones.",
            "It has seen no more than this training data and repeats its slant.",
        ],
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test scores of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
    settings = finished_settings(MlmSettings, folder, overrides)
    accelerator = make_accelerator(settings)
    tokenizer = load_tokenizer(settings)
    config = build_config(settings, tokenizer)
    max_length = visible_length(settings, config)
    data = masked_windows("test", load_texts(settings)["test"], tokenizer, max_length, settings)
    test = Evaluator(accelerator, data, DataCollatorForTokenClassification(tokenizer), settings)
    model = build_model(settings, config, AutoModelForMaskedLM)
    scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": len(data)}
    accelerator.print(json.dumps({"max_length": max_length, **scores}))
    return scores


def main(arguments: list[str] | None = None) -> None:
    command_line("pretrain_mlm.py", __doc__, MlmSettings, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
