"""Trains a document classifier, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/classify.py --config configs/era/local.yaml [key=value …] [--resume]
python training/classify.py --evaluate runs/era/local [max_length=512]
"""

import argparse
import inspect
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from building import build_config, build_model, load_tokenizer, visible_length
from checkpoints import Checkpoints, Progress
from documents import BUNDLED, DocumentSettings, encode_documents, load_documents
from huggingface_hub import EvalResult, ModelCard
from loop import Stopped, format_scores, make_loader, train
from metrics import OWN_METRICS, compute_metrics, load_metrics
from outputs import (
    CHECKPOINTS,
    LOGS,
    METRICS,
    SETTINGS,
    begin_folder,
    check_folder,
    hardware,
    remove_checkpoints,
    versions,
    write_metrics,
)
from settings import InputError
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

from efficient_transformers.cards import loading_code, model_card

METRIC_NAMES = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "loss": "Cross-entropy"}


@dataclass
class ClassifySettings(DocumentSettings):
    """The settings of this script; the shared ones are in settings.py and documents.py."""

    best_metric: str = "accuracy"
    extra_metrics: list[str] = field(default_factory=list)  # names for `evaluate.load`, which needs the network


class Evaluator:
    """Loss and metrics of a model on one split, over all processes."""

    def __init__(self, accelerator: Accelerator, data: datasets.Dataset, collate: Any, settings: ClassifySettings):
        self.accelerator, self.size = accelerator, len(data)
        self.metrics = load_metrics(settings.extra_metrics)
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
    if check_folder(accelerator, settings):
        remove_checkpoints_unless_kept(accelerator, settings)
        accelerator.print(f"The run in {settings.folder} is finished already.")
        return json.loads((settings.folder / METRICS).read_text(encoding="utf-8"))
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
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    accelerator.print(
        f"{config.model_type}, {parameters:,} parameters; {len(data['train'])} / {len(data['validation'])} / "
        f"{len(data['test'])} windows of up to {max_length} tokens; {len(names)} classes; {hardware(accelerator)}"
    )
    checkpoints = Checkpoints(settings.folder / CHECKPOINTS, settings.keep_checkpoints, accelerator)
    try:
        prepared, progress = train(accelerator, settings, model, data["train"], collate, validate, checkpoints)
    except Stopped:
        accelerator.end_training()
        raise
    scores = test(prepared)

    metrics = {
        "test": {**scores, "n": test.size},
        "validation": {**best_of(progress), "n": validate.size},
        "training": {
            "windows": len(data["train"]),
            "steps": progress.step,
            "epochs": progress.epoch,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / progress.seconds),
            "hardware": hardware(accelerator),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        },
        "model": {"model_type": config.model_type, "parameters": parameters, "max_length": max_length},
        "settings": yaml.safe_load(settings.to_yaml()),
        "history": progress.history,
        "versions": versions(),
    }
    if accelerator.is_main_process:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).save_pretrained(settings.folder)
        tokenizer.save_pretrained(settings.folder)
        text = card(settings, metrics, about(model), list(names.values()), command)
        (settings.folder / "README.md").write_text(f"{str(text).rstrip()}\n", encoding="utf-8")
        write_metrics(settings.folder, metrics)
    accelerator.wait_for_everyone()
    remove_checkpoints_unless_kept(accelerator, settings)
    accelerator.end_training()
    report(accelerator, settings, metrics)
    return metrics


def make_accelerator(settings: ClassifySettings) -> Accelerator:
    torch.set_float32_matmul_precision(settings.matmul_precision)
    folder = str(settings.folder)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=str(settings.folder / LOGS)),
    )
    if not (accelerator.is_main_process and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return accelerator


def best_of(progress: Progress) -> dict[str, float]:
    return next(entry for entry in progress.history if entry["step"] == progress.best_step)


def remove_checkpoints_unless_kept(accelerator: Accelerator, settings: ClassifySettings) -> None:
    if accelerator.is_main_process and not settings.keep_checkpoints_at_end:
        remove_checkpoints(settings.folder)


def about(model: PreTrainedModel) -> str:
    """What the model's file says of it in its first paragraph."""
    module = inspect.getmodule(type(model))
    return (inspect.getdoc(module) or "").partition("\n\n")[0]


def card(
    settings: ClassifySettings, metrics: dict[str, Any], description: str, labels: list[str], command: str
) -> ModelCard:
    """The model card, from the same numbers as `metrics.json`."""
    training, model = metrics["training"], metrics["model"]
    # a path on the disk says nothing to a reader of the card, and its folders are nobody's business
    dataset = settings.data if settings.data in BUNDLED else Path(settings.data).name
    on_hub = "/" in settings.data and not Path(settings.data).suffix
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=settings.data if on_hub else dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="f1" if key == "macro_f1" else key,
            metric_name=METRIC_NAMES.get(key, key),
            metric_value=value,
        )
        for key, value in metrics["test"].items()
        if key not in ("n", "loss")
    ]
    is_cut = settings.window_length and model["max_length"] < settings.window_length
    cut = f", of which the model sees the first {model['max_length']:,}" if is_cut else ""
    unit = f"windows of {settings.window_length:,} tokens{cut}" if settings.window_length else "documents"
    return model_card(
        name=settings.folder.name,
        auto_class="AutoModelForSequenceClassification",
        description=f"{description}\n\nA classifier of documents into {len(labels)} classes: {', '.join(labels)}.",
        results=results,
        training={
            "data": f"{dataset}: {training['windows']:,} {unit}",
            "test data": f"{metrics['test']['n']:,} {unit}",
            "parameters": f"{model['parameters']:,}",
            "optimiser": f"AdamW, learning rate {settings.learning_rate:g}, weight decay {settings.weight_decay:g}, "
            f"{settings.schedule} schedule, warm-up {settings.warmup_ratio:g} of the steps",
            "steps": f"{training['steps']:,} of {settings.batch_size} x {settings.gradient_accumulation} x "
            f"{training['processes']} examples ({training['tokens']:,} tokens)",
            "weights kept": f"best validation {settings.best_metric}, step {metrics['validation']['step']:,}",
            "seed": settings.seed,
            "hardware": f"{training['hardware']}, precision {training['precision']}",
            "time": f"{training['seconds']:,} s, {training['tokens_per_second']:,} tokens/s",
            "software": ", ".join(f"{key} {value}" for key, value in metrics["versions"].items()),
        },
        command=command or "accelerate launch training/classify.py --config settings.yaml",
        limits=[
            f"It has learnt these {len(labels)} classes from {training['windows']:,} training examples and knows no "
            "answer outside them.",
            f"It sees at most {model['max_length']:,} tokens of a text; cut or divide longer ones.",
            f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
            "different ones, and windows of one document are not independent of each other.",
        ],
        max_length=model["max_length"],
        license=settings.license,
        language=settings.language,
        notes=settings.card_notes or "",
        datasets=[settings.data] if on_hub else [],
        tags=[model["model_type"]],
    )


def report(accelerator: Accelerator, settings: ClassifySettings, metrics: dict[str, Any]) -> None:
    test, training, model = metrics["test"], metrics["training"], metrics["model"]
    shown = format_scores({key: value for key, value in test.items() if key not in ("n", "loss")})
    accelerator.print(
        f"\nTest: {shown} (n = {test['n']}).\n"
        f"Trained {training['steps']:,} steps in {training['seconds']:,} s, "
        f"{training['tokens_per_second']:,} tokens/s; best step {metrics['validation']['step']:,}.\n"
        f"Saved in {settings.folder}. To load it:\n\n"
        f"{loading_code(str(settings.folder), 'AutoModelForSequenceClassification', model['max_length'])}"
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test metrics of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
    if not (folder / METRICS).exists():
        raise InputError(f"{folder} holds no finished run: it has no {METRICS}.")
    settings = ClassifySettings.from_yaml(folder / SETTINGS, [*overrides, f"model={{checkpoint: '{folder}'}}"])
    settings.tokenizer = str(folder)
    settings.tracker = "none"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML with the settings; base.yaml beside it is its base")
    what.add_argument("--evaluate", type=Path, metavar="FOLDER", help="evaluate a finished run instead of training")
    parser.add_argument("--resume", action="store_true", help="the same as resume=true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that take the place of the YAML's")
    given = parser.parse_intermixed_args(arguments)
    try:
        if given.evaluate:
            evaluate_folder(given.evaluate, given.overrides)
            return
        overrides = [*given.overrides, *(["resume=true"] if given.resume else [])]
        launched = ["accelerate", "launch", "training/classify.py", "--config", str(given.config), *given.overrides]
        settings = ClassifySettings.from_yaml(given.config, overrides)
        try:
            run(settings, shlex.join(launched))
        except Stopped:
            PartialState().print(f"Stopped by SIGTERM and saved. To go on: {shlex.join(launched)} --resume", flush=True)
            sys.exit(143)  # what a shell reports for SIGTERM: a scheduler must not take the run for finished
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
