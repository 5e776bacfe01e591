"""Trains a model to recall, on generated sequences, measures it on others and saves it ready for the Hub.

accelerate launch training/recall.py --config configs/mqar/full.yaml [key=value …] [--resume]
python training/recall.py --evaluate runs/mqar-full [max_length=128]

The tasks are MQAR, copying, induction heads and a needle in real documents; see recall_tasks.py.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from batches import make_loader
from building import build_config, build_model, load_tokenizer, make_accelerator, model_facts, visible_length
from command_line import command_line, finished_settings
from generated import Examples, Generator, generate, word_tokenizer
from huggingface_hub import ModelCard
from language_models import window_sums
from loop import train
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from recall_tasks import Copy, Induction, Mqar, Needle
from reporting import make_card, report
from settings import InputError, did_you_mean
from texts import SPLITS, TextSettings, load_texts
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from efficient_transformers.cards import description_of

AUTO_CLASS = "AutoModelForTokenClassification"
GENERATED = {
    "mqar": "Multi-query associative recall: the value that stood behind a key, where the key stands again.",
    "copy": "Copying: the first tokens of a sequence, at its end.",
    "induction": "Induction heads: what stood behind a mark, where the mark stands again.",
}
NEEDLE = "A needle in a haystack: a fact planted in a document, asked for at its end."
TASKS = {**GENERATED, "needle": NEEDLE}


@dataclass
class RecallSettings(TextSettings):
    """The settings of this script; the shared ones are in settings.py. `data` is the task.

    A sequence has `max_length` tokens, or as many as the model can take. The data follow from `split_seed`.
    """

    train_examples: int = 100_000
    validation_examples: int = 1_000
    test_examples: int = 3_000
    items: int = 4  # pairs of key and value (mqar), symbols to be copied, facts (needle)
    vocabulary: int = 8192  # different tokens (mqar, copy, induction)
    power: float = 0.01  # of the law of the gaps in front of the queries (mqar)
    haystack: str = "era"  # documents to hide a needle in: a bundled corpus, a file, a folder or a Hub name

    def check(self) -> None:
        super().check()
        if self.data not in TASKS:
            raise InputError(f"data ({self.data!r}) must be one of {', '.join(TASKS)}{did_you_mean(self.data, TASKS)}.")
        for name in ("train_examples", "validation_examples", "test_examples", "items"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.vocabulary < 4:
            raise InputError(f"vocabulary ({self.vocabulary}) must be at least 4.")
        if self.data in GENERATED and self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no use: {self.data} makes its own words. Leave it out."
            )
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss or accuracy.")


def make_generator(settings: RecallSettings, length: int) -> Generator:
    """Of a task that needs no documents."""
    if settings.data == "mqar":
        return Mqar(length, settings.items, settings.vocabulary, settings.power)
    if settings.data == "copy":
        return Copy(length, settings.items, settings.vocabulary)
    assert settings.data == "induction"
    return Induction(length, settings.vocabulary)


def load_task(settings: RecallSettings) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer and the names of the answers, which do not depend on the length."""
    if settings.data == "needle":
        return load_tokenizer(settings), list(Needle.answers)
    any_length = make_generator(settings, 4 * settings.items + 3)
    return word_tokenizer(any_length.words, has_cls=False), list(any_length.answers)


def make_examples(
    settings: RecallSettings, tokenizer: PreTrainedTokenizerBase, length: int, splits: Sequence[str] = SPLITS
) -> dict[str, Examples]:
    if settings.data == "needle":
        # documents of one split, and so the windows of one document, are in no other
        texts = load_texts(dataclasses.replace(settings, data=settings.haystack))
        generators = {name: Needle(tokenizer, texts[name], length, settings.items) for name in splits}
    else:
        generators = dict.fromkeys(splits, make_generator(settings, length))
    return {
        name: generate(generators[name], name, getattr(settings, f"{name}_examples"), settings.split_seed)
        for name in splits
    }


class Evaluator:
    """Loss and accuracy at the positions that ask, each of them counting the same, over all processes."""

    def __init__(self, accelerator: Accelerator, data: Examples, collate: Any, settings: RecallSettings):
        self.accelerator, self.data = accelerator, data
        self.loader = accelerator.prepare(make_loader(data, collate, settings.eval_batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in self.loader:
            labels = batch.pop("labels")
            sums = torch.stack([window_sums(*pair) for pair in zip(model(**batch).logits, labels, strict=True)])
            # sums of each sequence are gathered: what fills up the last batch is known by its sequence
            gathered: Any = self.accelerator.gather_for_metrics(sums)
            totals += gathered.cpu().double().sum(0)
        loss, right, asked = totals.tolist()
        return {"loss": loss / asked, "accuracy": right / asked}


def run(settings: RecallSettings, command: str = "") -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
    accelerator = make_accelerator(settings)
    if (finished := finished_metrics(accelerator, settings)) is not None:
        return finished

    tokenizer, answers = load_task(settings)
    names = dict(enumerate(answers))
    config = build_config(settings, tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
    length = visible_length(settings, config)
    data = make_examples(settings, tokenizer, length)
    collate = DataCollatorForTokenClassification(tokenizer)
    set_seed(settings.seed)
    model = build_model(settings, config, AutoModelForTokenClassification)
    facts = model_facts(model, length)
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    accelerator.print(
        f"{config.model_type}, {facts['parameters']:,} parameters; {len(data['train'])} / {len(data['validation'])} / "
        f"{len(data['test'])} sequences of {length} tokens; {len(answers)} answers; {hardware(accelerator)}"
    )
    lengths = data["train"].lengths
    trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
    scores = {
        "test": {**test(trained), "n": len(data["test"])},
        "validation": {**progress.best_scores, "n": len(data["validation"])},
    }
    metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command)
    finish_folder(
        accelerator,
        settings,
        trained,
        tokenizer,
        card(settings, metrics, description_of(model), len(answers), command),
        metrics,
    )
    report(accelerator, settings, metrics, AUTO_CLASS, shown(metrics))
    return metrics


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": metrics["test"]["accuracy"]}


def card(settings: RecallSettings, metrics: dict[str, Any], description: str, answers: int, command: str) -> ModelCard:
    return make_card(
        settings,
        metrics,
        command or "accelerate launch training/recall.py --config settings.yaml",
        task_type="token-classification",
        auto_class=AUTO_CLASS,
        description=f"{description}\n\n{TASKS[settings.data]}",
        shown=shown(metrics),
        unit=f"sequences of {metrics['model']['max_length']:,} tokens",
        limits=[
            f"It knows this task and its {answers:,} answers alone: it is made to compare models by.",
            "Accuracy is that of the positions that ask; every other position is labelled, too, and means nothing.",
            "The results are of one seed; another seed may learn the task or fail to.",
        ],
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test scores of a finished run, on its own task unless `overrides` say otherwise, e.g. `max_length=128`."""
    settings = finished_settings(RecallSettings, folder, overrides)
    accelerator = make_accelerator(settings)
    tokenizer, answers = load_task(settings)
    config = build_config(settings, tokenizer)
    if answers != (trained := list((config.id2label or {}).values())):
        raise InputError(
            f"The task has {len(answers)} answers and the model in {folder} has {len(trained)}, or others: leave data "
            "and vocabulary as they were."
        )
    length = visible_length(settings, config)
    data = make_examples(settings, tokenizer, length, splits=("test",))["test"]
    model = build_model(settings, config, AutoModelForTokenClassification)
    test = Evaluator(accelerator, data, DataCollatorForTokenClassification(tokenizer), settings)
    scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": len(data)}
    accelerator.print(json.dumps({"max_length": length, **scores}))
    return scores


def main(arguments: list[str] | None = None) -> None:
    command_line("recall.py", __doc__, RecallSettings, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
