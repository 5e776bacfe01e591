"""One run in a process of its own, unless it is finished already."""

import json
import subprocess
from pathlib import Path
from typing import Any

from ..engine.outputs import METRICS, differences
from ..settings import REPOSITORY, InputError
from ..tasks import read_settings

TRAIN = REPOSITORY / "training/train.py"


class RunFailed(Exception):
    """A run has ended with another code than 0."""

    def __init__(self, folder: Path, code: int):
        super().__init__(f"The run in {folder} ended with code {code}; the same command continues it.")
        self.code = code


def train_or_find(config: Path, variant: str | None, options: list[str], launcher: list[str]) -> dict[str, Any]:
    """The metrics of one run, which is trained unless it is there."""
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
    return json.loads(finished.read_text(encoding="utf-8"))


def launch(command: list[str]) -> int:
    """Run a command and return its exit code."""
    return subprocess.run(command).returncode
