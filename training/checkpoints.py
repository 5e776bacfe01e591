"""Checkpoints that a kill at any moment cannot spoil, and the progress that they carry."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from settings import InputError

PARTIAL = ".partial"  # a folder being written or removed; never read, deleted at the next start


@dataclasses.dataclass
class Progress:
    """Where training stands. `batch` counts the batches of this epoch that are done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    before: dict[str, float] | None = None  # validation scores in front of the first step
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    processes: int = 1

    @property
    def best_scores(self) -> dict[str, float]:
        return next(entry for entry in self.history if entry["step"] == self.best_step)


class Checkpoints:
    """`step-<n>` folders below one folder, the newest `keep` of them, and the best weights."""

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator):
        self.folder, self.keep, self.accelerator = folder, keep, accelerator
        self.best_weights = folder / "best.safetensors"
        if accelerator.is_main_process:
            for leftover in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)

    def save(self, progress: Progress) -> None:
        """Written aside and renamed: a folder called `step-<n>` is always whole."""
        final = self.folder / f"step-{progress.step:09d}"
        if final.exists():
            return
        partial = final.with_suffix(PARTIAL)
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1), encoding="utf-8")
            partial.rename(final)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old.rename(old.with_suffix(PARTIAL)))
        self.accelerator.wait_for_everyone()

    def load(self) -> Progress:
        """Restores what `accelerator.prepare` got and the random states; a new Progress if nothing was saved."""
        saved = self.all()
        if not saved:
            return Progress(processes=self.accelerator.num_processes)
        values: dict[str, Any] = json.loads((saved[-1] / "progress.json").read_text(encoding="utf-8"))
        progress = Progress(**values)
        if progress.processes != self.accelerator.num_processes:
            raise InputError(
                f"The checkpoint {saved[-1].name} was saved by {progress.processes} processes and cannot be continued "
                f"by {self.accelerator.num_processes}: start as many, or begin anew with overwrite=true."
            )
        self.accelerator.load_state(str(saved[-1]))
        return progress
