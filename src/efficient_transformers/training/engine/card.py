"""Model card of a run, and its last lines on the screen, for all tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCard

from ...cards import PICTURE, loading_code, model_card
from ...exporting import README
from ...folders import read_json
from ...publishing import to_fill_in
from ..data.coverage import coverage_lines
from ..data.texts import BUNDLED, source_of
from ..settings import REPOSITORY, Settings, find_path
from .loop import format_scores

LONG = 1024  # tokens; models with shorter inputs are not tagged as long-document models
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "exact_match": "Exact match",
    "loss": "Cross-entropy",
    "perplexity": "Perplexity",
    "nats_per_byte": "Nats per byte",
    "bits_per_byte": "Bits per byte",
}
METRIC_TYPES = {"macro_f1": "f1", "loss": "cross-entropy"}  # names on the Hub, if they differ


def make_card(
    settings: Settings,
    metrics: dict[str, Any],
    command: str,
    *,
    task_type: str,
    auto_class: str,
    description: str,
    shown: Mapping[str, float],
    unit: str,
    limits: Sequence[str],
    training_rows: Mapping[str, Any] | None = None,
    test_unit: str | None = None,
    averaged: bool = False,
) -> ModelCard:
    """Create the model card, with the same numbers as in `metrics.json`.

    `shown` are test scores; `unit` names what is counted, and `test_unit` that of the test data if it differs.
    `averaged` means that scores are computed from the mean logits of a document's windows.

    The name of the model is `metrics["name"]`, or otherwise that of its folder.
    """
    model, code = metrics["model"], metrics.get("code", {})
    # readers of the card cannot use a local path, and its folders are private
    dataset = settings.data if settings.data in BUNDLED else Path(settings.data).name
    source = metrics["training"].get("data_source") or source_of(settings.data)
    on_hub = source == "hub"
    reads_text = auto_class != "AutoModelForImageClassification"
    longest_text = f"The model processes at most {model['max_length']:,} tokens; " + (
        "for longer texts, average the logits of windows over the whole text, as in the results above."
        if averaged
        else "truncate or split longer texts."
    )
    results = [
        EvalResult(
            task_type=task_type,
            # the user's own files are not the dataset of that name on the Hub
            dataset_type=settings.data if on_hub else "local" if source == "local" else dataset,
            dataset_name=f"{dataset} (local)" if source == "local" else dataset,
            dataset_split="test",
            metric_type=METRIC_TYPES.get(key, key),
            metric_name=METRIC_NAMES.get(key, key),
            metric_value=value,
        )
        for key, value in shown.items()
    ]
    return model_card(
        name=metrics.get("name", settings.folder.name),
        auto_class=auto_class,
        description=description,
        results=results,
        training=training_table(settings, metrics, dataset, (unit, test_unit or unit), training_rows or {}),
        command=command,
        limits=[*limits, longest_text] if reads_text else limits,
        max_length=model["max_length"],
        license=settings.license,
        language=settings.language,
        notes=settings.card_notes or "",
        datasets=[settings.data] if on_hub else bundled_names(settings),
        base_model=published_name(settings.model.get("checkpoint")),
        costs={int(length): tuple(flops) for length, flops in model.get("costs", {}).items()},
        code=code,
        picture=PICTURE if (settings.folder / PICTURE).exists() else None,
        tags=[*(["long-documents"] if reads_text and model["max_length"] >= LONG else []), model["model_type"]],
    )


def training_table(
    settings: Settings, metrics: dict[str, Any], dataset: str, units: tuple[str, str], rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Rows of the card's training table, including the `rows` of the task."""
    training, before, code = metrics["training"], metrics.get("before"), metrics.get("code", {})
    more = [Path(name).name for name in getattr(settings, "more_data", [])]
    checkpoint = settings.model.get("checkpoint")
    versions = metrics["versions"] | ({"efficient_transformers": code["version"]} if code else {})
    documents = coverage_lines(metrics.get("data", {}))
    rate = f"{settings.learning_rate:g}"
    if settings.head_learning_rate is not None:
        rate += f" ({settings.head_learning_rate:g} for new weights)"
    return {
        "data": f"{' and '.join([dataset, *more])}: {training['windows']:,} {units[0]}",
        "test data": f"{metrics['test']['n']:,} {units[1]}",
        **{f"documents, {line.partition(': ')[0]}": line.partition(": ")[2] for line in documents},
        **({"initialised from": published_name(checkpoint) or Path(checkpoint).name} if checkpoint else {}),
        **({"validation before training": format_scores(before)} if before else {}),
        **rows,
        "parameters": f"{metrics['model']['parameters']:,}",
        "optimizer": f"AdamW, learning rate {rate}, weight decay {settings.weight_decay:g}, "
        f"{settings.schedule} schedule, warm-up over {settings.warmup_ratio:g} of the steps",
        "steps": f"{training['steps']:,} of {settings.batch_size} x {settings.gradient_accumulation} x "
        f"{training['processes']} examples ({training['tokens']:,} tokens)",
        "selected weights": f"best validation {settings.best_metric}, step {metrics['validation']['step']:,}",
        "seed": settings.seed,
        "hardware": f"{training['hardware']}, precision {training['precision']}",
        "time": f"{training['seconds']:,} s, {training['tokens_per_second']:,} tokens/s",
        "software": ", ".join(f"{key} {value}" for key, value in versions.items()),
    }


def published_name(checkpoint: str | None) -> str | None:
    """Id of a checkpoint on the Hub: its name there, or the name in the metrics of a local folder."""
    path = find_path(checkpoint) if checkpoint else None
    if path is None:
        return checkpoint
    metrics = path / "metrics.json"
    return read_json(metrics).get("name") if metrics.exists() else None


def bundled_names(settings: Settings) -> list[str]:
    """Names of the bundled data that a run was trained on, without the user's own files."""
    files = [find_path(name) for name in getattr(settings, "more_data", [])]
    ours = [path.stem for path in files if path is not None and path.resolve().parent == REPOSITORY / "data"]
    return [BUNDLED[settings.data].name, *ours] if settings.data in BUNDLED else ours


def report(
    accelerator: Accelerator, settings: Settings, metrics: dict[str, Any], auto_class: str, shown: Mapping[str, float]
) -> None:
    test, training = metrics["test"], metrics["training"]
    accelerator.print(
        f"\nTest: {format_scores(dict(shown))} (n = {test['n']}).\n"
        f"Trained {training['steps']:,} steps in {training['seconds']:,} s, "
        f"{training['tokens_per_second']:,} tokens/s; best step {metrics['validation']['step']:,}.\n"
        f"Saved in {settings.folder}. To load it:\n\n"
        f"{loading_code(str(settings.folder), auto_class, metrics['model']['max_length'])}"
    )
    if missing := to_fill_in(settings.folder):
        accelerator.print(f"\nTo fill in at the top of {settings.folder / README}: {'; '.join(missing)}.")
