"""The output folder of a run: check, start or resume it, and write the files for the Hub."""

import dataclasses
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import datasets
import tokenizers
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ...exporting import code_version
from ...folders import check_folder, fit_tokenizer, read_json
from ..settings import FREE_TO_CHANGE, InputError, Settings, SettingsType, compose, merge, read_yaml
from .checkpoints import Progress, flush, remove, writing
from .lock import LOCK
from .sharding import whole_state

EARLIER = {"long_documents": "truncate"}  # behaviour of runs older than a setting, if it differs from the default
# what a finished run always records
METRICS_SECTIONS = {
    "settings": (),
    "model": ("model_type", "parameters", "max_length"),
    "training": ("windows", "steps", "tokens", "seconds", "tokens_per_second", "hardware", "processes", "precision"),
    "validation": ("step",),
    "test": ("n",),
    "versions": (),
}
SETTINGS, METRICS, CHECKPOINTS, LOGS = "settings.yaml", "metrics.json", "checkpoints", "runs"


def finished_metrics(accelerator: Accelerator, settings: Settings) -> dict[str, Any] | None:
    """Refuse an unusable folder before any other work; return the metrics of a finished run that is to be resumed."""
    error: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            _check_folder(settings)
        except InputError as refused:
            error = [str(refused)]
    broadcast_object_list(error)
    if error[0] is not None:
        raise InputError(error[0])
    if not (settings.resume and (settings.folder / METRICS).exists()):
        return None
    metrics = read_metrics(settings.folder)
    remove_checkpoints_unless_kept(accelerator, settings)
    accelerator.print(f"The run in {settings.folder} is already finished.")
    return metrics


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run. Raises InputError with the file name if there are none or parts are missing."""
    path = folder / METRICS
    if not path.exists():
        raise InputError(f"{folder} contains no finished run: it has no {METRICS}.")
    try:
        metrics = read_json(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    for section, names in METRICS_SECTIONS.items():
        found = metrics.get(section)
        for name in ("", *names):
            if not isinstance(found, dict) or (name and name not in found):
                place = f"{section}.{name}" if name else section
                raise InputError(f"{path} has no {place}: it is not that of a finished run. Copy the file again.")
    return metrics


def _check_folder(settings: Settings) -> None:
    folder = settings.folder
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be written ({error.strerror}): set out to another.") from None
    if not any(path.suffix != ".partial" and path.name != LOCK for path in folder.iterdir()):
        return
    # only files written by a run are ever deleted or resumed
    if not (folder / SETTINGS).exists():
        raise InputError(f"The output folder {folder} is not empty and contains no run: set out to another.")
    if settings.resume and (different := differences(folder, settings)):
        raise InputError(
            f"The run in {folder} was started with other settings ({'; '.join(different)}) and cannot be resumed "
            "with these: restore them, set another --out, or pass --overwrite."
        )
    if not settings.resume and not settings.overwrite:
        raise InputError(
            f"The output folder {folder} is not empty, it contains a run: --resume resumes it, --overwrite deletes "
            "it, another --out keeps both."
        )


def begin_folder(accelerator: Accelerator, settings: Settings) -> None:
    """Create the folder. Called when data and model are valid, so that a run that cannot start changes no files."""
    if accelerator.is_main_process:
        if settings.overwrite:
            for path in settings.folder.iterdir():
                if path.name != LOCK:
                    remove(path)
        if not (settings.folder / SETTINGS).exists():
            write_whole(settings.folder / SETTINGS, settings.to_yaml())
    accelerator.wait_for_everyone()


def differences(folder: Path, settings: Settings) -> list[str]:
    """Settings that differ from those of the run in `folder`, as `name: then → now`."""
    then = read_yaml(folder / SETTINGS)
    now = yaml.safe_load(settings.to_yaml())
    # a setting that is newer than the run has its default value
    names = {field.name: field.default for field in dataclasses.fields(settings)}
    then = names | {name: value for name, value in EARLIER.items() if name in names} | then
    names = sorted((then.keys() | now.keys()) - FREE_TO_CHANGE)
    return [f"{name}: {then.get(name)!r} → {now.get(name)!r}" for name in names if then.get(name) != now.get(name)]


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: readers, and runs resumed after a kill, find all of the text or no file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings of a finished run, with its saved model. Raises InputError if the run is not finished."""
    if not (folder / METRICS).exists():
        raise InputError(f"{folder} contains no finished run: it has no {METRICS}.")
    try:
        check_folder(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
    settings = merge(compose(folder / SETTINGS), {"model": {"checkpoint": str(folder)}})
    settings.pop("cache", None)  # a folder from elsewhere must not determine where files are written
    return settings


def finished_settings(settings_class: type[SettingsType], folder: Path, options: list[str]) -> SettingsType:
    """Settings for evaluating a finished run; `options` are command-line options, e.g. `["--max_length", "5"]`."""
    recorded, fields = recorded_settings(folder), {field.name for field in dataclasses.fields(settings_class)}
    recorded = {name: value for name, value in EARLIER.items() if name in fields} | recorded
    settings = settings_class.from_options(recorded, options)
    settings.tokenizer, settings.tracker = str(folder), "none"
    return settings


def versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, datasets, tokenizers)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes}x {torch.cuda.get_device_name(accelerator.device)}"
    processes = f"{accelerator.num_processes} processes of " if accelerator.num_processes > 1 else ""
    return f"{processes}{torch.get_num_threads()} CPU threads ({platform.machine()})"


def peak_memory_mb(accelerator: Accelerator) -> int:
    """Peak memory of this process so far: of the GPU, or without one of the computer."""
    if accelerator.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(accelerator.device) / 2**20)
    # on Linux, ru_maxrss starts at the peak of the parent process
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return round(int(found[1]) / 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 1024)  # macOS counts bytes, others KiB


def metrics_of(
    accelerator: Accelerator,
    settings: Settings,
    progress: Progress,
    windows: int,
    model: dict[str, Any],
    scores: dict[str, dict[str, float]],
    command: str = "",
) -> dict[str, Any]:
    """The contents of `metrics.json`: the `scores` of the splits, and details of the run."""
    return {
        **scores,
        **({"before": progress.before} if progress.before else {}),
        "training": {
            "windows": windows,
            "steps": progress.step,
            "epochs": progress.epoch,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / progress.seconds),
            "peak_memory_mb": peak_memory_mb(accelerator),
            "hardware": hardware(accelerator),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        },
        "model": model,
        **({"command": command} if command else {}),
        "settings": yaml.safe_load(settings.to_yaml()),
        "history": progress.history,
        "versions": versions(),
        "code": code_version(),
    }


def finish_folder(
    accelerator: Accelerator,
    settings: Settings,
    model: torch.nn.Module,
    preparation: PreTrainedTokenizerBase | BaseImageProcessor,
    card: ModelCard,
    metrics: dict[str, Any],
) -> None:
    """Save the model, its preprocessor and the card; then the metrics, which mark the run as finished."""
    state = whole_state(accelerator, model)
    if accelerator.is_main_process:
        with writing("The trained model", settings.folder):
            bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            bare.save_pretrained(settings.folder, state_dict=state)
            if isinstance(preparation, PreTrainedTokenizerBase):
                fit_tokenizer(preparation, bare.config, metrics["model"]["max_length"])
            preparation.save_pretrained(settings.folder)
            (settings.folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
            write_whole(settings.folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    accelerator.wait_for_everyone()
    remove_checkpoints_unless_kept(accelerator, settings)
    accelerator.end_training()


def remove_checkpoints_unless_kept(accelerator: Accelerator, settings: Settings) -> None:
    if accelerator.is_main_process and not settings.keep_checkpoints_at_end:
        shutil.rmtree(settings.folder / CHECKPOINTS, ignore_errors=True)
