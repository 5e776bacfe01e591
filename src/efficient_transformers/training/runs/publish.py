"""Publish a finished run as a folder of the zoo, rewrite its card, or check it.

    python training/publish.py runs/zoo_era-local model_cards/local-era
    python training/publish.py --cards model_cards/local-era [model_cards/linear-era …]
    python training/publish.py --check model_cards/local-era [model_cards/linear-era …]

The folder contains no code: `efficient-transformers export` and `push` add the current code. The weights are rounded to
bfloat16, in files of at most 3 MB, and load as float32; the test scores in the card are those of the rounded weights.
The card shows the tokens that each token attends to, and records the logits for a fixed text. `--check` exports each
folder and runs check_published.py on it, in a process that cannot import the package. Code that comes with a folder,
such as that of a tokenizer, runs only with `--trust_remote_code`.
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
from ...attention_maps import read_matrices
from ...cards import PICTURE, costs_of, description_of
from ...exporting import CONFIG, README, export, foreign_code
from ...folders import check_folder, fit_tokenizer, load_as_float32, read_json
from ...trust import ALLOW, UntrustedCodeError, refusing_code
from ..data.documents import encode_documents, load_documents
from ..engine.building import load_tokenizer
from ..engine.checkpoints import write_json
from ..engine.outputs import METRICS, SETTINGS, read_metrics
from ..engine.task import Task
from ..settings import InputError
from ..tasks import classify, pretrain_clm, pretrain_mlm, task_of
from . import check_published
from .errors import add_debug, input_errors

MOST_BYTES = 3_000_000
DRAWN_TOKENS = 512
PALETTE = 128  # colours


PUBLISHED: tuple[Task[Any], ...] = (classify.TASK, pretrain_mlm.TASK, pretrain_clm.TASK)


def publish(run: Path, out: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write the folder `out` and return its metrics. `trust_remote_code` allows code in `run` to run.

    Raises InputError if the run is not finished, `out` is the run itself, the run's task is not in PUBLISHED, its files
    need code that is not trusted, or a file is too large.
    """
    metrics = read_metrics(run)
    check_folder(run)
    task = published_task(run, metrics)
    if out.resolve() == run.resolve():
        raise InputError(f"{out} is the run itself, whose weights would be overwritten: choose another folder.")
    trust = trust_options(trust_remote_code)
    settings = task.settings_class.from_yaml(run / SETTINGS, trust)
    settings.tokenizer = str(run)
    task.scorer.check(settings)
    tokenizer = load_tokenizer(settings)
    with refusing_code(run):
        model = task.auto_class.from_pretrained(run, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    model.save_pretrained(out, max_shard_size=MOST_BYTES)
    for code in out.glob("*.py"):  # copies would become outdated: `export` adds the code
        code.unlink()
    load_as_float32(out)
    fit_tokenizer(tokenizer, model.config)
    tokenizer.save_pretrained(out)
    shutil.copy(run / SETTINGS, out / SETTINGS)
    metrics["name"] = f"et-{out.name}"
    write_json(out / METRICS, metrics)  # marks the folder as that of a finished run

    scores = task.evaluate_folder(out, ["--matmul_precision", "highest", *trust])
    metrics["test_before_rounding"], metrics["test"] = metrics["test"], {**metrics["test"], **scores}
    write_json(out / METRICS, metrics)
    write_card(out, trust_remote_code=trust_remote_code)
    if too_large := [path.name for path in out.iterdir() if path.stat().st_size > MOST_BYTES]:
        raise InputError(f"{out} has files over {MOST_BYTES:,} bytes: {', '.join(too_large)}. Train a smaller model.")
    return metrics


def trust_options(trust_remote_code: bool) -> list[str]:
    return ["--trust_remote_code"] if trust_remote_code else []


def write_card(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write picture and card of a folder of the zoo from its weights, settings and metrics."""
    metrics = read_metrics(folder)
    check_folder(folder)
    task = published_task(folder, metrics)
    settings = task.settings_class.from_yaml(folder / SETTINGS)
    with refusing_code(folder):
        model = task.auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)
        logits = recorded_logits(folder, task.auto_class.__name__, trust_remote_code)
    draw_pattern(folder, metrics["model"]["model_type"], trust_remote_code)
    metrics["model"]["costs"] = costs_of(model.config, metrics["model"]["max_length"])
    sections = [settings.card_notes or "", logits]
    settings.card_notes = "\n\n".join(section.strip() for section in sections if section)
    settings.out = str(folder)  # contains the picture
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    card = task.card(settings, metrics, description_of(model), labels, metrics.get("command", ""))
    (folder / README).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def published_task(folder: Path, metrics: dict[str, Any]) -> Task[Any]:
    if (task := task_of(metrics["settings"])) not in PUBLISHED:
        known = ", ".join(each.name for each in PUBLISHED)
        raise InputError(f"{folder} is a run of the task {task.name}; only {known} can be published.")
    return task


def draw_pattern(folder: Path, model_type: str, trust_remote_code: bool) -> None:
    """Draw the picture of the card: the tokens attended to in the first layer, and in layers that differ from it."""
    if (variant := VARIANTS.get(model_type.removeprefix("et_"))) is not None:
        drawn = plots.load_model(str(folder), DRAWN_TOKENS, None, trust_remote_code=trust_remote_code)
        figure = plots.pattern_figure(read_matrices(*drawn), variant.title)
        (path,) = plots.save(figure, folder / Path(PICTURE).stem, (Path(PICTURE).suffix,))
        reduce_colours(path)


def reduce_colours(path: Path) -> None:
    """Convert a picture to a palette, which takes a third of the bytes; curves and matrices look the same."""
    Image.open(path).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def recorded_logits(folder: Path, auto_class: str, trust_remote_code: bool) -> str:
    """The section of the card that `--check` compares."""
    logits = check_published.logits_of(folder, auto_class, trust_remote_code)
    recorded = {"auto_class": auto_class, "text": check_published.TEXT, "logits": logits}
    which = "" if auto_class == check_published.CLASSIFIER else " (last token, first entries of the vocabulary)"
    return (
        "## Recorded logits\n\nThe weights are stored in bfloat16 and load as float32, the precision of the results. "
        f"The logits for a fixed text{which}, to verify a copy:\n\n"
        f"```json\n{json.dumps(recorded)}\n```"
    )


def check(folders: list[Path], *, trust_remote_code: bool = False) -> int:
    """Export folders and compare them with their cards in a process without the package; return its exit code.

    That process runs the code of the exported folders: the package's own, and with `trust_remote_code` any other.
    Otherwise, raises UntrustedCodeError, which names the code.
    """
    with tempfile.TemporaryDirectory() as temporary:
        exported = []
        for folder in folders:
            exported.append(Path(temporary, str(len(exported)), folder.name))
            export(folder, exported[-1])
            if not trust_remote_code and (code := foreign_code(exported[-1])):
                raise UntrustedCodeError(
                    f"Checking {folder} would run code that comes with it: {'; '.join(code)}. {ALLOW}."
                )
            if published_task(folder, read_metrics(folder)).auto_class.__name__ == check_published.CLASSIFIER:
                with contextlib.suppress(OSError, ValueError):  # a broken tokenizer: the check reports it
                    windows = test_windows(folder, trust_remote_code)
                    write_json(exported[-1].with_name(check_published.WINDOWS), windows)
        return subprocess.run([sys.executable, check_published.__file__, *exported]).returncode


def test_windows(folder: Path, trust_remote_code: bool) -> dict[str, list[Any]]:
    """Token ids and classes of a classifier's test windows, split as for its card."""
    settings = classify.ClassifySettings.from_yaml(folder / SETTINGS)
    positions = read_json(folder / CONFIG)["max_position_embeddings"]
    length = min(settings.max_length or settings.window_length or positions, positions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    windows = encode_documents(load_documents(settings), "test", tokenizer, length, settings)
    return {name: windows.column(name) for name in ("input_ids", "labels")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="RUN and OUT, or the folders to rewrite or check")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cards", action="store_true", help="rewrite picture and card of each folder")
    modes.add_argument("--check", action="store_true", help="compare each folder with its card")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the folders")
    add_debug(parser)
    given = parser.parse_args(arguments)
    trust = given.trust_remote_code
    if not (given.check or given.cards) and len(given.folders) != 2:
        parser.error("a run and an output folder are required")
    with input_errors(ValueError, OSError, debug=given.debug):
        if given.check:
            sys.exit(check(given.folders, trust_remote_code=trust))
        if given.cards:
            for folder in given.folders:
                write_card(folder, trust_remote_code=trust)
            return
        run, out = given.folders
        metrics = publish(run, out, trust_remote_code=trust)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics["test"].items())
    print(f"{out}: {scores}")
