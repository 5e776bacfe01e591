"""Trains a document classifier, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/classify.py --config configs/era/local.yaml [key=value …] [--resume]
python training/classify.py --evaluate runs/era-local [max_length=512]
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from batches import make_loader
from building import build_config, build_model, load_tokenizer, make_accelerator, model_facts, visible_length
from command_line import command_line, finished_settings
from documents import DocumentSettings, encode_documents, load_documents
from huggingface_hub import ModelCard
from loop import train
from metrics import OWN_METRICS, compute_metrics, load_metrics
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from reporting import make_card, report
from self_pretraining import SelfPretrainingSettings, card_row, self_pretrain
from settings import InputError, Settings
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from efficient_transformers.cards import description_of

AUTO_CLASS = "AutoModelForSequenceClassification"


@dataclass
class ClassifySettings(DocumentSettings, SelfPretrainingSettings):
    """The settings of this script; the shared ones are in settings.py, texts.py, documents.py, self_pretraining.py."""

    best_metric: str = "accuracy"
    extra_metrics: list[str] = field(default_factory=list)  # names for `evaluate.load`, which needs the network


class Evaluator:
    """Loss and metrics of a model on one split, over all processes."""

    def __init__(self, accelerator: Accelerator, data: Any, collate: Any, settings: Settings):
        self.accelerator, self.size = accelerator, len(data)
        self.metrics = load_metrics(getattr(settings, "extra_metrics", ()))
        self.loader = accelerator.prepare(make_loader(data, collate, settings.eval_batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        losses, predictions, references = [], [], []
        for batch in self.loader:
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            loss = cross_entropy(logits, labels, reduction="none")
            gathered = self.accelerator.gather_for_metrics((loss, logits.argmax(-1), labels))
            for whole, part in zip((losses, predictions, references), gathered, strict=True):
                whole.extend(part.tolist())
        return {"loss": sum(losses) / len(losses), **compute_metrics(self.metrics, predictions, references)}


def run(settings: ClassifySettings, command: str = "") -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
    accelerator = make_accelerator(settings)
    if (finished := finished_metrics(accelerator, settings)) is not None:
        return finished
    known = ("loss", *OWN_METRICS, *settings.extra_metrics)
    if settings.best_metric not in known:
        raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(known)}.")

    tokenizer = load_tokenizer(settings)
    documents = load_documents(settings)
    names = dict(enumerate(documents.labels))
    config = build_config(settings, tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
    max_length = visible_length(settings, config, default=settings.window_length)
    data = encode_documents(documents, tokenizer, max_length, settings)
    collate = DataCollatorWithPadding(tokenizer)
    set_seed(settings.seed)
    model = build_model(settings, config, AutoModelForSequenceClassification)
    facts = model_facts(model, max_length)
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    accelerator.print(
        f"{config.model_type}, {facts['parameters']:,} parameters; {len(data['train'])} / {len(data['validation'])} / "
        f"{len(data['test'])} windows of up to {max_length} tokens; {len(names)} classes; {hardware(accelerator)}"
    )
    learnt = self_pretrain(accelerator, settings, model, data, tokenizer)
    lengths = [len(ids) for ids in data["train"]["input_ids"]]
    trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
    scores = {
        "test": {**test(trained), "n": test.size},
        "validation": {**progress.best_scores, "n": validate.size},
    }
    metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command)
    if learnt is not None:
        metrics["self_pretraining"] = learnt
    text = card(settings, metrics, description_of(model), documents.labels, command)
    finish_folder(accelerator, settings, trained, tokenizer, text, metrics)
    report(accelerator, settings, metrics, AUTO_CLASS, shown(metrics))
    return metrics


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics["test"].items() if key not in ("n", "loss")}


def card(
    settings: ClassifySettings, metrics: dict[str, Any], description: str, labels: list[str], command: str
) -> ModelCard:
    windows, max_length = metrics["training"]["windows"], metrics["model"]["max_length"]
    is_cut = settings.window_length and max_length < settings.window_length
    cut = f", of which the model sees the first {max_length:,}" if is_cut else ""
    return make_card(
        settings,
        metrics,
        command or "accelerate launch training/classify.py --config settings.yaml",
        task_type="text-classification",
        auto_class=AUTO_CLASS,
        description=f"{description}\n\nA classifier of documents into {len(labels)} classes: {', '.join(labels)}.",
        shown=shown(metrics),
        unit=f"windows of {settings.window_length:,} tokens{cut}" if settings.window_length else "documents",
        training_rows=card_row(metrics["self_pretraining"]) if "self_pretraining" in metrics else None,
        limits=[
            f"It has learnt these {len(labels)} classes from {windows:,} training examples and knows no "
            "answer outside them.",
            f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
            "different ones, and windows of one document are not independent of each other.",
        ],
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test metrics of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
    settings = finished_settings(ClassifySettings, folder, overrides)
    accelerator = make_accelerator(settings)
    tokenizer = load_tokenizer(settings)
    config = build_config(settings, tokenizer)
    documents = load_documents(settings)
    trained = list((config.id2label or {}).values())
    if documents.labels != trained:
        raise InputError(f"The data has the classes {documents.labels} and the model in {folder} has {trained}.")
    max_length = visible_length(settings, config, default=settings.window_length)
    data = encode_documents(documents, tokenizer, max_length, settings)
    test = Evaluator(accelerator, data["test"], DataCollatorWithPadding(tokenizer), settings)
    model = build_model(settings, config, AutoModelForSequenceClassification)
    scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": test.size}
    accelerator.print(json.dumps({"max_length": max_length, **scores}))
    return scores


def main(arguments: list[str] | None = None) -> None:
    command_line("classify.py", __doc__, ClassifySettings, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
