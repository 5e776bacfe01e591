"""Trains an image classifier, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/classify_images.py --config configs/pixels/local.yaml [key=value …] [--resume]
python training/classify_images.py --evaluate runs/pixels-local
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from building import build_config, build_model, make_accelerator, model_facts
from classify import Evaluator, shown
from command_line import command_line, finished_settings
from huggingface_hub import ModelCard
from loop import train
from metrics import OWN_METRICS
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from pictures import PictureCollator, PictureSettings, load_pictures
from reporting import make_card, report
from settings import InputError
from transformers import AutoModelForImageClassification, PreTrainedConfig

from efficient_transformers import EtImageProcessor
from efficient_transformers.cards import description_of
from efficient_transformers.models.configuration import EtConfig

AUTO_CLASS = "AutoModelForImageClassification"


@dataclass
class ClassifyImagesSettings(PictureSettings):
    """The settings of this script; the shared ones are in settings.py and pictures.py."""

    best_metric: str = "accuracy"


def run(settings: ClassifyImagesSettings, command: str = "") -> dict[str, Any]:
    """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
    accelerator = make_accelerator(settings)
    if (finished := finished_metrics(accelerator, settings)) is not None:
        return finished
    known = ("loss", *OWN_METRICS)
    if settings.best_metric not in known:
        raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(known)}.")

    data, names = load_pictures(settings)
    config = build_config(
        settings, None, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    processor, collate = prepare(settings, config)
    set_seed(settings.seed)
    model = build_model(settings, config, AutoModelForImageClassification)
    facts = model_facts(model, config.max_position_embeddings)
    validate = Evaluator(accelerator, data["validation"], collate, settings)
    test = Evaluator(accelerator, data["test"], collate, settings)

    begin_folder(accelerator, settings)
    accelerator.print(
        f"{config.model_type}, {facts['parameters']:,} parameters; {len(data['train']):,} / "
        f"{len(data['validation']):,} / {len(data['test']):,} images of {facts['max_length']} tokens; "
        f"{len(names)} classes; {hardware(accelerator)}"
    )
    lengths = [facts["max_length"]] * len(data["train"])
    trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
    scores = {
        "test": {**test(trained), "n": test.size},
        "validation": {**progress.best_scores, "n": validate.size},
    }
    metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command)
    text = card(settings, metrics, description_of(model), names, command)
    finish_folder(accelerator, settings, trained, processor, text, metrics)
    report(accelerator, settings, metrics, AUTO_CLASS, shown(metrics))
    return metrics


def prepare(settings: ClassifyImagesSettings, config: PreTrainedConfig) -> tuple[EtImageProcessor, PictureCollator]:
    """The image processor and the collator of a model's images."""
    if not isinstance(config, EtConfig):
        raise InputError(
            f"A {config.model_type} model cannot be trained here: model_type must be one of the zoo's, et_…."
        )
    try:
        processor = EtImageProcessor.for_model(config, **settings.image_processor)
    except ValueError as error:
        raise InputError(f"The model section cannot be used: {error}") from error
    return processor, PictureCollator(processor, config.max_position_embeddings)


def card(
    settings: ClassifyImagesSettings, metrics: dict[str, Any], description: str, labels: list[str], command: str
) -> ModelCard:
    model, seen = metrics["settings"]["model"], metrics["model"]["max_length"]
    shape = f"{seen:,} patches" if model.get("patch_size", 16) > 1 else f"{seen:,} pixels"
    return make_card(
        settings,
        metrics,
        command or "accelerate launch training/classify_images.py --config settings.yaml",
        task_type="image-classification",
        auto_class=AUTO_CLASS,
        description=f"{description}\n\nA classifier of images into {len(labels)} classes: {', '.join(labels)}.",
        shown=shown(metrics),
        unit=f"images as sequences of {shape}",
        limits=[
            f"It has learnt these {len(labels)} classes from {metrics['training']['windows']:,} images and knows no "
            "answer outside them; images are resized to the one size it was trained on.",
            f"The results are of one seed and {metrics['test']['n']:,} test images.",
        ],
    )


def evaluate_folder(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Test metrics of a finished run, on its own data unless `overrides` say otherwise."""
    settings = finished_settings(ClassifyImagesSettings, folder, overrides)
    accelerator = make_accelerator(settings)
    config = build_config(settings, None)
    data, names = load_pictures(settings)
    trained = list((config.id2label or {}).values())
    if names != trained:
        raise InputError(f"The data has the classes {names} and the model in {folder} has {trained}.")
    _, collate = prepare(settings, config)
    test = Evaluator(accelerator, data["test"], collate, settings)
    model = build_model(settings, config, AutoModelForImageClassification)
    scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": test.size}
    accelerator.print(json.dumps(scores))
    return scores


def main(arguments: list[str] | None = None) -> None:
    command_line("classify_images.py", __doc__, ClassifyImagesSettings, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
