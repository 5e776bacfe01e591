"""Makes a folder for the Hub of a finished run.

    python training/publish.py runs/zoo_era-local model_cards/local
    python training/publish.py --check model_cards/local [model_cards/linear …]

The weights are rounded to bfloat16, in files of at most 3 MB, and the test scores of the card are those of the rounded
weights. The card shows what the model reads, and records the logits of a fixed text. `--check` is
training/check_published.py in a process of its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_published
import classify
import pretrain_clm
import pretrain_mlm
import torch
import transformers
from building import load_tokenizer
from checkpoints import write_json
from huggingface_hub import ModelCard
from language_models import Task
from outputs import METRICS, SETTINGS
from settings import InputError, Settings
from train_all import SCRIPTS
from transformers import PreTrainedModel

from efficient_transformers import VARIANTS, plots
from efficient_transformers.cards import PICTURE, description_of
from efficient_transformers.matrices import read_matrices

MOST_BYTES = 3_000_000
DRAWN_TOKENS = 512


@dataclass(frozen=True)
class Kind:
    """How the runs of one script are opened, evaluated and described."""

    settings_class: type[Settings]
    auto_class: str
    evaluate_folder: Callable[[Path, list[str]], dict[str, float]]
    card: Callable[[Any, dict[str, Any], PreTrainedModel], ModelCard]


def classifier_card(settings: classify.ClassifySettings, metrics: dict[str, Any], model: PreTrainedModel) -> ModelCard:
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]  # type: ignore[index]
    return classify.TASK.card(settings, metrics, description_of(model), labels, metrics.get("command", ""))


def language_model(task: Task[Any]) -> Kind:
    def card(settings: Any, metrics: dict[str, Any], model: PreTrainedModel) -> ModelCard:
        return task.card(settings, metrics, description_of(model), metrics.get("command", ""))

    return Kind(task.settings_class, task.auto_class.__name__, task.evaluate_folder, card)


KINDS = {
    "classify.py": Kind(
        classify.ClassifySettings, check_published.CLASSIFIER, classify.evaluate_folder, classifier_card
    ),
    "pretrain_mlm.py": language_model(pretrain_mlm.TASK),
    "pretrain_clm.py": language_model(pretrain_clm.TASK),
}


def publish(run: Path, out: Path) -> dict[str, Any]:
    """Writes the folder `out` and returns its metrics.

    Raises InputError if the run is not finished, or of a script without a `Kind`, or a file gets too large.
    """
    metrics = read_metrics(run)
    script = script_of(metrics)
    if (kind := KINDS.get(script)) is None:
        raise InputError(f"{run} was trained by {script}; what can be published is trained by {', '.join(KINDS)}.")
    settings = kind.settings_class.from_yaml(run / SETTINGS)
    settings.tokenizer = str(run)
    auto_class = getattr(transformers, kind.auto_class)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    auto_class.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(out, max_shard_size=MOST_BYTES)
    load_tokenizer(settings).save_pretrained(out)
    shutil.copy(run / SETTINGS, out / SETTINGS)
    draw_pattern(out, metrics["model"]["model_type"])
    write_json(out / METRICS, metrics)  # only a folder that has it is that of a finished run

    scores = kind.evaluate_folder(out, ["matmul_precision=highest"])
    metrics["test_before_rounding"], metrics["test"] = metrics["test"], {**metrics["test"], **scores}
    sections = [settings.card_notes or "", recorded_logits(out, kind.auto_class)]
    settings.card_notes = "\n\n".join(section.strip() for section in sections if section)
    settings.out = str(out)  # whose name the card has
    card = kind.card(settings, metrics, auto_class.from_pretrained(out))
    (out / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
    write_json(out / METRICS, metrics)
    if too_large := [path.name for path in out.iterdir() if path.stat().st_size > MOST_BYTES]:
        raise InputError(f"{out} has files over {MOST_BYTES:,} bytes: {', '.join(too_large)}. Train a smaller model.")
    return metrics


def read_metrics(run: Path) -> dict[str, Any]:
    if not (run / METRICS).exists():
        raise InputError(f"{run} holds no finished run: it has no {METRICS}.")
    return json.loads((run / METRICS).read_text(encoding="utf-8"))


def script_of(metrics: dict[str, Any]) -> str:
    return SCRIPTS.get(str(metrics["settings"]["config"]).partition("/")[0], "a script that is not known")


def draw_pattern(folder: Path, model_type: str) -> None:
    """The picture of the card: what the tokens of a text read in the first layer, and in others that differ."""
    if (variant := VARIANTS.get(model_type.removeprefix("et_"))) is not None:
        figure = plots.pattern_figure(read_matrices(*plots.load_model(str(folder), DRAWN_TOKENS, None)), variant.title)
        plots.save(figure, folder / Path(PICTURE).stem, (Path(PICTURE).suffix,))


def recorded_logits(folder: Path, auto_class: str) -> str:
    """A section of the card: what a check compares."""
    logits = check_published.logits_of(folder, auto_class)
    recorded = {"auto_class": auto_class, "text": check_published.TEXT, "logits": logits}
    which = "" if auto_class == check_published.CLASSIFIER else ", at its last token and the first of the vocabulary"
    return (
        "## Recorded logits\n\nThe weights are stored in bfloat16; the results are of these weights, computed in "
        f"float32 (`dtype=torch.float32`). So is what the model gives for this text{which}:\n\n"
        f"```json\n{json.dumps(recorded)}\n```"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="RUN and OUT, or with --check those to be checked")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    if given.check:
        sys.exit(subprocess.run([sys.executable, check_published.__file__, *given.folders]).returncode)
    if len(given.folders) != 2:
        parser.error("a run and the folder to write are needed")
    run, out = given.folders
    try:
        metrics = publish(run, out)
    except InputError as error:
        sys.exit(f"error: {error}")
    scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics["test"].items())
    print(f"{out}: {scores}")


if __name__ == "__main__":
    main()
