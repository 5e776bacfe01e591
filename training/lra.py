"""Trains a classifier on a task of the Long Range Arena, evaluates it and saves it ready for the Hub.

accelerate launch training/lra.py --config configs/listops/full.yaml [key=value …] [--resume]
python training/lra.py --evaluate runs/listops-full [max_length=512]

ListOps and Pathfinder are generated, images are Fashion-MNIST's, text is read as bytes (Tay et al. 2020,
arXiv:2011.04006). Retrieval, which has two documents, is the business of match.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from building import build_config, build_model, make_accelerator, model_facts, visible_length
from classify import ClassifySettings, Evaluator, shown
from command_line import command_line, finished_settings
from documents import encode_documents, load_documents
from fashion_mnist import CLASSES, FOLDER, PIXELS, load_fashion_mnist
from generated import Examples, Generator, byte_tokenizer, generate, with_special, word_tokenizer
from huggingface_hub import ModelCard
from listops import ListOps
from loop import train
from metrics import OWN_METRICS
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from pathfinder import Pathfinder
from reporting import make_card, report
from self_pretraining import card_row, self_pretrain
from settings import InputError
from texts import SPLITS
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from efficient_transformers.cards import description_of

AUTO_CLASS = "AutoModelForSequenceClassification"
TASKS = {
    "listops": "ListOps: the digit that a nested list of digits and operators comes to.",
    "pathfinder": "Pathfinder: whether two dots lie at the ends of one dashed path, from a picture's pixels in a row.",
    "fashion_mnist": "Fashion-MNIST: the class of a garment, from the pixels of its picture in a row.",
}
TEXT = "Documents, read as bytes."


@dataclass
class LraSettings(ClassifySettings):
    """The settings of this script; the shared ones are in settings.py, texts.py, documents.py and classify.py.

    `data` is listops, pathfinder, fashion_mnist, or labelled documents, which are read as bytes. What is generated
    follows from `split_seed`.
    """

    train_examples: int | None = None  # default: the paper's number (listops, pathfinder), or all there are
    validation_examples: int | None = None
    test_examples: int | None = None
    cache: str | None = None  # folder for generated examples, which other runs on the same ones then read
    min_tokens: int = 500  # listops: a list has more tokens than this,
    max_tokens: int = 2000  # and fewer than this
    contour_length: int = 14  # pathfinder: dashes of a long path
    image_folder: str = FOLDER  # fashion_mnist: of its four files

    def check(self) -> None:
        super().check()
        for name in SPLITS:
            if (size := getattr(self, f"{name}_examples")) is not None and size < 1:
                raise InputError(f"{name}_examples ({size}) must be at least 1.")
            if size is not None and self.data not in TASKS:
                raise InputError(
                    f"{name}_examples ({size}) has no use: all documents of {self.data} are taken. Leave it out."
                )
        if self.best_metric not in (known := ("loss", *OWN_METRICS, *self.extra_metrics)):
            raise InputError(f"best_metric ({self.best_metric!r}) must be one of {', '.join(known)}.")
        if self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no use: these tasks are read by the word, the pixel or the byte. "
                "Leave it out, or train with training/classify.py."
            )


@dataclass
class Source:
    """A task's tokenizer, the names of its classes, and its splits at a longest length."""

    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    encode: Callable[[int], dict[str, Any]]


def load_source(settings: LraSettings) -> Source:
    if settings.data == "listops":
        generator = ListOps(settings.min_tokens, settings.max_tokens)
        return generated_source(settings, generator, (96_000, 2_000, 2_000))
    if settings.data == "pathfinder":
        # the paper divides 200,000 pictures 8 : 1 : 1
        return generated_source(settings, Pathfinder(settings.contour_length), (160_000, 20_000, 20_000))
    if settings.data == "fashion_mnist":
        images = load_fashion_mnist(settings.image_folder)
        return Source(word_tokenizer(PIXELS, has_cls=True), list(CLASSES), partial(image_splits, settings, images))
    documents, tokenizer = load_documents(settings), byte_tokenizer()
    return Source(tokenizer, documents.labels, lambda length: encode_documents(documents, tokenizer, length, settings))


def generated_source(settings: LraSettings, generator: Generator, sizes: tuple[int, int, int]) -> Source:
    def splits(max_length: int) -> dict[str, Examples]:
        made = {}
        for name, size in zip(SPLITS, sizes, strict=True):
            asked = getattr(settings, f"{name}_examples") or size
            whole = generate(generator, name, asked, settings.split_seed, settings.cache)
            made[name] = Examples(whole.ids, whole.labels, max_length)
        return made

    return Source(word_tokenizer(generator.words, has_cls=True), list(generator.answers), splits)


def image_splits(settings: LraSettings, images: dict[str, Any], max_length: int) -> dict[str, Examples]:
    made = {}
    for name, (pictures, labels) in images.items():
        size = getattr(settings, f"{name}_examples")
        rows = [with_special(picture.ravel(), has_cls=True) for picture in pictures[:size]]
        made[name] = Examples(rows, labels[:size].tolist(), max_length)
    return made


def lengths_of(data: Dataset) -> list[int]:
    return data.lengths if isinstance(data, Examples) else [len(ids) for ids in data["input_ids"]]


def run(settings: LraSettings, command: str = "") -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
    accelerator = make_accelerator(settings)
    if (finished := finished_metrics(accelerator, settings)) is not None:
        return finished

    source = load_source(settings)
    names = dict(enumerate(source.labels))
    config = build_config(settings, source.tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
    max_length = visible_length(settings, config, default=settings.window_length)
    data = source.encode(max_length)
    collate = DataCollatorWithPadding(source.tokenizer)
    set_seed(settings.seed)
    model = build_model(settings, config, AutoModelForSequenceClassification)
    facts = model_facts(model, max_length)
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    accelerator.print(
        f"{config.model_type}, {facts['parameters']:,} parameters; {len(data['train'])} / {len(data['validation'])} / "
        f"{len(data['test'])} sequences of up to {max_length} tokens; {len(names)} classes; {hardware(accelerator)}"
    )
    learnt = self_pretrain(accelerator, settings, model, data, source.tokenizer)
    lengths = lengths_of(data["train"])
    trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
    scores = {
        "test": {**test(trained), "n": test.size},
        "validation": {**progress.best_scores, "n": validate.size},
    }
    metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command)
    if learnt is not None:
        metrics["self_pretraining"] = learnt
    text = card(settings, metrics, description_of(model), command)
    finish_folder(accelerator, settings, trained, source.tokenizer, text, metrics)
    report(accelerator, settings, metrics, AUTO_CLASS, shown(metrics))
    return metrics


def card(settings: LraSettings, metrics: dict[str, Any], description: str, command: str) -> ModelCard:
    return make_card(
        settings,
        metrics,
        command or "accelerate launch training/lra.py --config settings.yaml",
        task_type="text-classification",
        auto_class=AUTO_CLASS,
        description=f"{description}\n\n{TASKS.get(settings.data, TEXT)}",
        shown=shown(metrics),
        unit=f"sequences of up to {metrics['model']['max_length']:,} tokens",
        training_rows=card_row(metrics["self_pretraining"]) if "self_pretraining" in metrics else None,
        limits=[
            "A task of the Long Range Arena is made to compare models by: it says little of what they do with text.",
            f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
            "different ones.",
        ],
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test metrics of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
    settings = finished_settings(LraSettings, folder, overrides)
    accelerator = make_accelerator(settings)
    source = load_source(settings)
    config = build_config(settings, source.tokenizer)
    if source.labels != (trained := list((config.id2label or {}).values())):
        raise InputError(f"The data has the classes {source.labels} and the model in {folder} has {trained}.")
    max_length = visible_length(settings, config, default=settings.window_length)
    test = Evaluator(
        accelerator, source.encode(max_length)["test"], DataCollatorWithPadding(source.tokenizer), settings
    )
    model = build_model(settings, config, AutoModelForSequenceClassification)
    scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": test.size}
    accelerator.print(json.dumps({"max_length": max_length, **scores}))
    return scores


def main(arguments: list[str] | None = None) -> None:
    command_line("lra.py", __doc__, LraSettings, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
