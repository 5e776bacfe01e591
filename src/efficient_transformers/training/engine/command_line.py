"""The command line of a training script: a config or a finished run, overrides, and what the exit code says."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..settings import InputError, SettingsType
from .loop import Stopped
from .outputs import METRICS, SETTINGS


def command_line(
    script: str,
    doc: str | None,
    settings_class: type[SettingsType],
    run: Callable[[SettingsType, str], Any],
    evaluate_folder: Callable[[Path, list[str]], Any],
    arguments: list[str] | None = None,
) -> None:
    """Runs `script`, or evaluates a folder. Ends the process on what the user must know: 1 with an error, 143 if the
    run was stopped by SIGTERM and can go on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        launched = ["accelerate", "launch", f"training/{script}", "--config", str(given.config), *given.overrides]
        settings = settings_class.from_yaml(given.config, overrides)
        try:
            run(settings, shlex.join(launched))
        except Stopped:
            PartialState().print(f"Stopped by SIGTERM and saved. To go on: {shlex.join(launched)} --resume", flush=True)
            sys.exit(143)  # what a shell reports for SIGTERM: a scheduler must not take the run for finished
    except InputError as error:
        sys.exit(f"error: {error}")


def finished_settings(settings_class: type[SettingsType], folder: Path, overrides: list[str]) -> SettingsType:
    """The settings of a finished run, with the model that it has saved."""
    if not (folder / METRICS).exists():
        raise InputError(f"{folder} holds no finished run: it has no {METRICS}.")
    settings = settings_class.from_yaml(folder / SETTINGS, [*overrides, f"model={{checkpoint: '{folder}'}}"])
    settings.tokenizer = str(folder)
    settings.tracker = "none"
    return settings
