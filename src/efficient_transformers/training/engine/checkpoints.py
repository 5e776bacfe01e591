"""Checkpoints that survive a kill at any moment, and the progress they contain."""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..settings import InputError
from .sharding import load_whole, whole_state
from .state import STATE, TrainingState

PARTIAL = ".partial"  # a folder being written or removed; never loaded, deleted at the next start
PROGRESS, MANIFEST = "progress.json", "files.json"  # the manifest has the size and CRC-32 of every other file


@dataclasses.dataclass
class Progress:
    """Progress of training. `steps_of_epoch` is the number of completed steps in the current epoch."""

    step: int = 0
    epoch: int = 0
    steps_of_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    before: dict[str, float] | None = None  # validation scores before the first step
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    processes: int = 1

    @property
    def best_scores(self) -> dict[str, float]:
        return next(entry for entry in self.history if entry["step"] == self.best_step)


class Checkpoints:
    """The newest `keep` checkpoints, in `step-<n>` folders of one folder, and the best weights."""

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder, self.keep, self.accelerator = folder, keep, accelerator
        self.best_weights = folder / "best.safetensors"
        if accelerator.is_main_process:
            for leftover in folder.glob(f"*{PARTIAL}"):
                remove(leftover)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)

    def save(self, progress: Progress, state: TrainingState) -> None:
        """Save to a temporary folder and rename it once it is on disk: `step-<n>` folders are always complete."""
        final = self.folder / f"step-{progress.step:09d}"
        if final.exists():
            return
        partial = final.with_suffix(PARTIAL)
        with writing(f"The checkpoint of step {progress.step}", self.folder, partial):
            state.save(partial)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(partial / PROGRESS, dataclasses.asdict(progress))
                write_json(partial / MANIFEST, {name: list(seal(path)) for name, path in files_of(partial)})
                for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
                    flush(path)
                partial.rename(final)
                flush(self.folder)
                for old in self.all()[: -self.keep]:
                    shutil.rmtree(old.rename(old.with_suffix(PARTIAL)))
        self.accelerator.wait_for_everyone()

    def load(self, state: TrainingState) -> Progress:
        """Restore the state of the newest checkpoint and return its progress, or a new one if there is none.

        A corrupt checkpoint is reported and removed, and the previous one is loaded.
        """
        # one process chooses for all: sharded weights must be loaded by all processes or none
        chosen: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            chosen = list(self._newest_whole())
        broadcast_object_list(chosen)
        path, error = chosen
        if error is not None:
            raise InputError(error)
        if path is None:
            return Progress(processes=self.accelerator.num_processes)
        progress = read_progress(path)
        if progress.processes != self.accelerator.num_processes:
            raise InputError(
                f"The checkpoint {path.name} was saved by {progress.processes} processes and cannot be resumed "
                f"by {self.accelerator.num_processes}: start the same number, or start again with --overwrite."
            )
        try:
            state.load(path)
        except Exception as error:  # the checksums say that nothing has changed, not who wrote the files or what
            raise InputError(
                f"The checkpoint {path} is not one of this run ({type(error).__name__}: {error}): start again with "
                "--overwrite, or set --out to another folder."
            ) from error
        # remove newer, corrupt ones, which would block new checkpoints of the same step
        if self.accelerator.is_main_process:
            for spoilt in self.all():
                if spoilt > path:
                    shutil.rmtree(spoilt.rename(spoilt.with_suffix(PARTIAL)))
        self.accelerator.wait_for_everyone()
        return progress

    def _newest_whole(self) -> tuple[Path | None, str | None]:
        """Return the newest checkpoint that can be read, or an error message if there are some but none can be read."""
        faults = []
        for path in reversed(self.all()):
            if (fault := fault_of(path)) is None:
                return path, None
            faults.append(f"{path.name}: {fault}")
            self.accelerator.print(f"The checkpoint {path} cannot be read ({fault}): trying the previous one.")
        if not faults:
            return None, None
        return None, (
            f"None of the checkpoints in {self.folder} can be read ({'; '.join(faults)}): start again with "
            "--overwrite, or set --out to another folder."
        )

    def save_best(self, model: torch.nn.Module) -> None:
        state = whole_state(self.accelerator, model)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.best_weights.with_suffix(PARTIAL)
            with writing("The best weights", self.folder, partial):
                save_file(state, partial)
                flush(partial)
                partial.replace(self.best_weights)
                flush(self.folder)
        self.accelerator.wait_for_everyone()

    def load_best(self, model: torch.nn.Module) -> None:
        try:
            load_whole(self.accelerator, model, self.best_weights)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"The best weights {self.best_weights} cannot be read ({error}): start again with --overwrite."
            ) from error


def fault_of(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint, such as a missing or changed file; None if it is intact."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest.items():
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                return f"{MANIFEST} names {name}, which is not in its folder"
            found = seal(checkpoint / name)
            if found != (size, checksum):
                return f"{name} has {found[0]:,} bytes of {size:,}" if found[0] != size else f"{name} has changed"
        read_progress(checkpoint)
        if STATE not in manifest:
            return f"it has no {STATE}: an older version saved it, as pickles, which are not opened"
    except OSError as error:
        return f"{Path(error.filename or '').name}: {error.strerror}"
    except (ValueError, TypeError, AttributeError) as error:  # invalid JSON, or JSON with other content
        return f"{MANIFEST} or {PROGRESS}: {error}"
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Raises ValueError or TypeError for a file that holds something else."""
    progress = Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))
    for field in dataclasses.fields(Progress):
        value = getattr(progress, field.name)
        if field.type is int and not (type(value) is int and value >= 0):
            raise ValueError(f"{field.name} ({value!r}) must be a count")
    return progress


def files_of(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]


def seal(path: Path) -> tuple[int, int]:
    """Flush a file to disk and return its size and CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str, folder: Path, partial: Path | None = None) -> Iterator[None]:
    """Raise InputError with the free space if writing fails, and remove the incomplete `partial`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:  # torch's writer has no error class and does not state the cause
                raise
            reason = "the disk or a quota is full, or a file size limit is reached"
        if partial is not None:
            remove(partial)
        raise InputError(
            f"{what} could not be written to {folder}: {reason}. {shutil.disk_usage(folder).free / 1e6:,.1f} MB are "
            "free there. Earlier files are kept: free some space, and continue with --resume."
        ) from error
