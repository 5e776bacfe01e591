"""Start a run in a separate process, unless it is already finished."""

import subprocess
from pathlib import Path
from typing import Any

from ..engine.outputs import METRICS, differences, read_metrics
from ..settings import REPOSITORY, InputError
from ..tasks import read_settings

TRAIN = REPOSITORY / "training/train.py"


class RunFailed(Exception):
    """A run ended with a non-zero exit code."""

    def __init__(self, folder: Path, code: int):
        super().__init__(f"The run in {folder} ended with exit code {code}; the same command resumes it.")
        self.code = code


def train_or_find(config: Path, variant: str | None, options: list[str], launcher: list[str]) -> dict[str, Any]:
    """Return the metrics of one run, and train it first if necessary."""
    _, settings = read_settings(config, variant, options)
    finished = settings.folder / METRICS
    if not finished.exists():
        of_variant = [] if variant is None else ["--variant", variant]
        command = [*launcher, str(TRAIN), "--config", str(config), *of_variant, *options, "--resume"]
        if code := launch(command):
            raise RunFailed(settings.folder, code)
    elif different := differences(settings.folder, settings):
        raise InputError(
            f"{settings.folder} holds a run with other settings ({'; '.join(different)}): set --out to another folder."
        )
    return read_metrics(settings.folder)


def launch(command: list[str]) -> int:
    """Run a command and return its exit code."""
    return subprocess.run(command).returncode
