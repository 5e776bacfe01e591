"""Make the folder of the zoo from a finished run, write its card again, or check it.

    python training/publish.py runs/zoo_era-local model_cards/local-era
    python training/publish.py --cards model_cards/local-era [model_cards/linear-era …]
    python training/publish.py --check model_cards/local-era [model_cards/linear-era …]

The folder holds no code: `efficient-transformers export` and `push` add that of the day. The weights are rounded to
bfloat16, in files of at most 3 MB, and load as float32; the test scores of the card are those of the rounded weights.
The card shows what a token attends to, and records the logits of a fixed text. `--check` exports each folder and runs
check_published.py on it, in a process that cannot import the package.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from ... import VARIANTS, plots
from ...cards import PICTURE, costs_of, description_of
from ...exporting import CONFIG, README, export
from ...folders import fit_tokenizer, load_as_float32
from ...matrices import read_matrices
from ..data.documents import encode_documents, load_documents
from ..engine.building import load_tokenizer
from ..engine.checkpoints import write_json
from ..engine.outputs import METRICS, SETTINGS
from ..engine.task import Task
from ..settings import InputError
from ..tasks import classify, pretrain_clm, pretrain_mlm, task_of
from . import check_published

MOST_BYTES = 3_000_000
DRAWN_TOKENS = 512
PALETTE = 128  # colours


PUBLISHED: tuple[Task[Any], ...] = (classify.TASK, pretrain_mlm.TASK, pretrain_clm.TASK)


def publish(run: Path, out: Path) -> dict[str, Any]:
    """Write the folder `out` and return its metrics.

    Raises InputError if the run is not finished, `out` is the run itself, the run's task is not in PUBLISHED, or a file
    gets too large.
    """
    metrics = read_metrics(run)
    task = published_task(run, metrics)
    if out.resolve() == run.resolve():
        raise InputError(f"{out} is the run itself, whose weights would be overwritten: name another folder.")
    settings = task.settings_class.from_yaml(run / SETTINGS)
    settings.tokenizer = str(run)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    model = task.auto_class.from_pretrained(run, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size=MOST_BYTES)
    for code in out.glob("*.py"):  # copies would grow stale: `export` adds the code
        code.unlink()
    load_as_float32(out)
    tokenizer = load_tokenizer(settings)
    fit_tokenizer(tokenizer, model.config)
    tokenizer.save_pretrained(out)
    shutil.copy(run / SETTINGS, out / SETTINGS)
    metrics["name"] = f"et-{out.name}"
    write_json(out / METRICS, metrics)  # only a folder that has it is that of a finished run

    scores = task.evaluate_folder(out, ["--matmul_precision", "highest"])
    metrics["test_before_rounding"], metrics["test"] = metrics["test"], {**metrics["test"], **scores}
    write_json(out / METRICS, metrics)
    write_card(out)
    if too_large := [path.name for path in out.iterdir() if path.stat().st_size > MOST_BYTES]:
        raise InputError(f"{out} has files over {MOST_BYTES:,} bytes: {', '.join(too_large)}. Train a smaller model.")
    return metrics


def write_card(folder: Path) -> None:
    """Write picture and card of a folder of the zoo, from its weights, settings and metrics."""
    metrics = read_metrics(folder)
    task = published_task(folder, metrics)
    settings = task.settings_class.from_yaml(folder / SETTINGS)
    model = task.auto_class.from_pretrained(folder)
    draw_pattern(folder, metrics["model"]["model_type"])
    metrics["model"]["costs"] = costs_of(model.config, metrics["model"]["max_length"])
    sections = [settings.card_notes or "", recorded_logits(folder, task.auto_class.__name__)]
    settings.card_notes = "\n\n".join(section.strip() for section in sections if section)
    settings.out = str(folder)  # where the picture is
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    card = task.card(settings, metrics, description_of(model), labels, metrics.get("command", ""))
    (folder / README).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def published_task(folder: Path, metrics: dict[str, Any]) -> Task[Any]:
    if (task := task_of(metrics["settings"])) not in PUBLISHED:
        known = ", ".join(each.name for each in PUBLISHED)
        raise InputError(f"{folder} is of the task {task.name}; what can be published is of {known}.")
    return task


def read_metrics(run: Path) -> dict[str, Any]:
    if not (run / METRICS).exists():
        raise InputError(f"{run} holds no finished run: it has no {METRICS}.")
    return json.loads((run / METRICS).read_text(encoding="utf-8"))


def draw_pattern(folder: Path, model_type: str) -> None:
    """The picture of the card: what tokens attend to in the first layer, and in others that differ."""
    if (variant := VARIANTS.get(model_type.removeprefix("et_"))) is not None:
        figure = plots.pattern_figure(read_matrices(*plots.load_model(str(folder), DRAWN_TOKENS, None)), variant.title)
        (path,) = plots.save(figure, folder / Path(PICTURE).stem, (Path(PICTURE).suffix,))
        reduce_colours(path)


def reduce_colours(path: Path) -> None:
    """Give a picture a palette, in which it takes a third of the bytes; its curves and matrices look the same."""
    Image.open(path).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def recorded_logits(folder: Path, auto_class: str) -> str:
    """The section of the card that a check compares."""
    logits = check_published.logits_of(folder, auto_class)
    recorded = {"auto_class": auto_class, "text": check_published.TEXT, "logits": logits}
    which = "" if auto_class == check_published.CLASSIFIER else " (last token, first entries of the vocabulary)"
    return (
        "## Recorded logits\n\nThe weights are stored in bfloat16 and load as float32, in which the results were "
        f"measured. The logits of a fixed text{which}, by which a copy can be checked:\n\n"
        f"```json\n{json.dumps(recorded)}\n```"
    )


def check(folders: list[Path]) -> int:
    """Export folders and compare them with their cards, in a process without the package; return its exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        exported = []
        for folder in folders:
            exported.append(Path(temporary, str(len(exported)), folder.name))
            export(folder, exported[-1])
            if published_task(folder, read_metrics(folder)).auto_class.__name__ == check_published.CLASSIFIER:
                with contextlib.suppress(OSError, ValueError):  # a broken tokenizer: the check reports it
                    write_json(exported[-1].with_name(check_published.WINDOWS), test_windows(folder))
        return subprocess.run([sys.executable, check_published.__file__, *exported]).returncode


def test_windows(folder: Path) -> dict[str, list[Any]]:
    """Token ids and classes of a classifier's test windows, cut as for its card."""
    settings = classify.ClassifySettings.from_yaml(folder / SETTINGS)
    positions = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["max_position_embeddings"]
    length = min(settings.max_length or settings.window_length or positions, positions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = encode_documents(load_documents(settings), "test", tokenizer, length, settings)
    return {name: list(windows[name]) for name in ("input_ids", "labels")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="RUN and OUT, or the folders to write or to check")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cards", action="store_true", help="write picture and card of each folder again")
    modes.add_argument("--check", action="store_true", help="compare each folder with its card")
    given = parser.parse_args(arguments)
    if given.check:
        sys.exit(check(given.folders))
    if given.cards:
        for folder in given.folders:
            write_card(folder)
        return
    if len(given.folders) != 2:
        parser.error("a run and the folder to write are needed")
    run, out = given.folders
    try:
        metrics = publish(run, out)
    except InputError as error:
        sys.exit(f"error: {error}")
    scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics["test"].items())
    print(f"{out}: {scores}")
