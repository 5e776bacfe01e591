"""The training loop shared by all tasks: accumulate, clip, evaluate, keep the best weights, save, stop and resume."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from ..settings import InputError, Settings
from .batches import Batch, EpochSampler, Steps, lengths_of
from .checkpoints import Checkpoints, Progress
from .outputs import CHECKPOINTS
from .progress import progress_bar
from .sharding import name_blocks
from .state import TrainingState
from .streaming import Stream, StreamedSteps


class Stopped(Exception):
    """Training stopped after SIGTERM; the state is saved."""


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """Create AdamW without weight decay on biases and norms (one-dimensional parameters).

    New weights get `head_learning_rate` if it is set.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            is_new = getattr(parameter, "newly_initialized", False)
            rate = (settings.head_learning_rate if is_new else None) or settings.learning_rate
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
        lr=settings.learning_rate,
    )


def train(
    accelerator: Accelerator,
    settings: Settings,
    model: PreTrainedModel,
    data: Any,
    collate: Any,
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
) -> tuple[torch.nn.Module, Progress]:
    """Train to the end, or save and raise Stopped on SIGTERM; return the prepared model with its best weights.

    A checkpoint includes the states of dropout, data order, schedule and moments: a run that was killed and resumed
    ends with the same weights, bit for bit, as an uninterrupted one. Random choices in examples must depend only on the
    seed, the epoch (set by `data.set_epoch`) and the index, because a loader reads ahead of the saved state.
    `data` may be a Stream.
    """
    run = Run.begun(accelerator, settings, model, make_steps(accelerator, settings, data, collate))
    progress = run.progress
    if settings.eval_first and progress.before is None:
        progress.before = evaluate(run.model)
        record_scores(accelerator, 0, progress.before, "before training")

    with (
        progress_bar("training", run.total, progress.step, accelerator.is_main_process) as bar,
        noticing_sigterm() as heard,
    ):
        while not run.over:
            run.model.train()
            began = time.perf_counter()
            for batches in run.steps.of_epoch(progress.epoch, progress.steps_of_epoch):
                loss = run.step(batches)
                progress.seconds += time.perf_counter() - began
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                run.log(loss)
                if run.must_evaluate:
                    judge(accelerator, settings, progress, evaluate(run.model), run.model, run.checkpoints)
                    run.model.train()
                stops = heard(accelerator) and not run.over
                if stops or run.must_save:
                    run.checkpoints.save(progress, run.state)
                if stops:
                    accelerator.end_training()
                    raise Stopped
                if run.over:
                    break
                began = time.perf_counter()
            else:
                if run.steps.per_epoch is None:  # the end of a stream is known only when it is reached
                    progress.epoch, progress.steps_of_epoch = progress.epoch + 1, 0
    run.checkpoints.load_best(run.model)
    return run.model, progress


@dataclass
class Run:
    """State of a run on this process: what is trained, the progress, and what is due after a step."""

    accelerator: Accelerator
    settings: Settings
    steps: Steps | StreamedSteps
    total: int  # optimizer steps
    state: TrainingState
    checkpoints: Checkpoints
    progress: Progress

    @classmethod
    def begun(
        cls, accelerator: Accelerator, settings: Settings, model: PreTrainedModel, steps: Steps | StreamedSteps
    ) -> "Run":
        """Create a run at its first step, or after the newest checkpoint."""
        checkpoints = Checkpoints(settings.folder / CHECKPOINTS, settings.keep_checkpoints, accelerator)
        if accelerator.process_index:
            torch.manual_seed(settings.seed + accelerator.process_index)  # different dropout in each process
        name_blocks(accelerator, model)
        prepared, optimizer = accelerator.prepare(model, make_optimizer(model, settings))
        total = settings.max_steps or settings.epochs * (steps.per_epoch or 0)  # a stream has max_steps
        # not prepared: accelerate would step it once per process, but the steps counted here are optimizer steps
        schedule = get_scheduler(settings.schedule, optimizer, math.ceil(settings.warmup_ratio * total), total)
        state = TrainingState(accelerator, prepared, optimizer, schedule)
        progress = checkpoints.load(state)
        if progress.step:
            accelerator.print(f"Resuming after step {progress.step} of {total}.")
        start_tracker(accelerator, settings, progress.step)
        return cls(accelerator, settings, steps, total, state, checkpoints, progress)

    @property
    def model(self) -> torch.nn.Module:
        return self.state.model

    def step(self, batches: list[Batch]) -> float:
        """Take one optimizer step on all processes and return its loss."""
        losses, norm = take_step(self.accelerator, self.settings, self.model, self.state.optimizer, batches)
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips a step if its gradients overflow
            self.state.schedule.step()
        epoch_ended = self.progress.steps_of_epoch + 1 == self.steps.per_epoch
        return record_step(self.accelerator, self.progress, batches, losses, norm, epoch_ended)

    def log(self, loss: float) -> None:
        if self.is_last or self.progress.step % self.settings.log_steps == 0:
            values = {"train/loss": loss, "train/learning_rate": self.state.schedule.get_last_lr()[0]}
            self.accelerator.log(values | {"train/tokens": self.progress.tokens}, step=self.progress.step)

    @property
    def is_last(self) -> bool:
        return self.progress.step == self.total

    @property
    def over(self) -> bool:
        patience = self.settings.patience
        return self.progress.step >= self.total or (patience is not None and self.progress.without_gain >= patience)

    @property
    def must_evaluate(self) -> bool:
        """True after every `eval_steps` steps, or every epoch, and after the last step."""
        epoch_ended = self.progress.steps_of_epoch == 0
        every = self.settings.eval_steps
        return self.is_last or (self.progress.step % every == 0 if every else epoch_ended)

    @property
    def must_save(self) -> bool:
        """True after every `checkpoint_steps` steps, or every evaluation, and at the end."""
        every = self.settings.checkpoint_steps
        return self.over or (self.progress.step % every == 0 if every else self.must_evaluate)


def make_steps(accelerator: Accelerator, settings: Settings, data: Any, collate: Any) -> Steps | StreamedSteps:
    size = settings.step_size(accelerator.num_processes)
    shared: dict[str, Any] = {
        "size": size,
        "batch_size": settings.batch_size,
        "device": accelerator.device,
        "processes": accelerator.num_processes,
        "process": accelerator.process_index,
    }
    if isinstance(data, Stream):
        return StreamedSteps(data, collate, **shared)
    lengths = lengths_of(data) if settings.sort_by_length else None
    order = EpochSampler(len(data), settings.seed, lengths, size)
    return Steps(data, collate, order, workers=settings.dataloader_num_workers, **shared)


def take_step(
    accelerator: Accelerator, settings: Settings, model: torch.nn.Module, optimizer: Any, batches: list[Batch]
) -> tuple[list[torch.Tensor], Any]:
    """Take one optimizer step on all processes; return the contribution of each batch to its loss, and the gradient
    norm.

    The loss of a step is the mean over all its labels, however they are distributed over batches and processes. The
    loss of a batch, which the model returns as a mean, is therefore weighted by its number of labels.
    """
    labels = torch.stack([batch.labels() for batch in batches])
    weights = labels / summed(accelerator, labels.sum())
    # accelerate divides by the number of batches and averages over the processes
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(batches)
    scale = len(batches) * accelerator.num_processes
    losses: list[torch.Tensor] = []
    norm = None
    for batch, weight in zip(batches, weights, strict=True):
        with accelerator.accumulate(model):
            loss = model(**batch.inputs).loss
            accelerator.backward(loss * (weight * scale))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float() * weight)
    return losses, norm.full_tensor() if isinstance(norm, DTensor) else norm


def summed(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes."""
    total: Any = accelerator.reduce(values, reduction="sum") if accelerator.num_processes > 1 else values
    return total


def record_step(
    accelerator: Accelerator,
    progress: Progress,
    batches: list[Batch],
    losses: list[torch.Tensor],
    norm: Any,
    epoch_ended: bool,
) -> float:
    """Count one optimizer step and return its loss. Raises InputError with the examples if it is not finite."""
    tokens = torch.stack([batch.tokens() for batch in batches]).sum()
    loss, tokens = summed(accelerator, torch.stack([torch.stack(losses).sum(), tokens])).tolist()
    progress.step += 1
    progress.steps_of_epoch += 1
    progress.tokens += round(tokens)
    if epoch_ended:
        progress.epoch, progress.steps_of_epoch = progress.epoch + 1, 0
    remedy = (
        "Earlier checkpoints are kept; lower learning_rate, raise warmup_ratio, use mixed_precision=no, or inspect "
        "these examples."
    )
    if not math.isfinite(loss):
        bad = [batch for batch, part in zip(batches, losses, strict=True) if not part.isfinite()]
        raise InputError(
            f"The loss of step {progress.step} is {loss}: training has diverged. It happened on the training "
            f"examples {named(bad)} (counted from 0). {remedy}"
        )
    # with a scaler, it checks every step for gradients that overflow
    if norm is not None and accelerator.scaler is None and not math.isfinite(norm):
        raise InputError(
            f"The gradient of step {progress.step} is not finite, although its loss is {loss:.4g}: training has "
            f"diverged on the training examples {named(batches)} (counted from 0). {remedy}"
        )
    return loss


def named(batches: list[Batch]) -> str:
    """Indices of the examples of batches on all processes, abbreviated if there are many."""
    indices = gather_object([index for batch in batches for index in batch.indices])
    return ", ".join(map(str, indices[:64])) + (f" and {len(indices) - 64} more" if len(indices) > 64 else "")


def judge(
    accelerator: Accelerator,
    settings: Settings,
    progress: Progress,
    scores: dict[str, float],
    model: torch.nn.Module,
    checkpoints: Checkpoints,
) -> None:
    """Record an evaluation, and save the weights if they are the best so far."""
    if settings.best_metric not in scores:
        raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(scores)}.")
    score = scores[settings.best_metric]
    sign = -1 if settings.best_metric == "loss" else 1
    gained = progress.best is None or sign * score > sign * progress.best
    if gained:
        progress.best, progress.best_step, progress.without_gain = score, progress.step, 0
        checkpoints.save_best(model)
    else:
        progress.without_gain += 1
    progress.history.append({"step": progress.step, **scores})
    record_scores(accelerator, progress.step, scores, f"step {progress.step}", " (best)" if gained else "")


def record_scores(accelerator: Accelerator, step: int, scores: dict[str, float], when: str, remark: str = "") -> None:
    accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=step)
    if accelerator.is_main_process:
        tqdm.write(f"{when}: {format_scores(scores)}{remark}")


def format_scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def start_tracker(accelerator: Accelerator, settings: Settings, step: int) -> None:
    if settings.tracker != "none":
        # entries logged after the checkpoint will be logged again
        purge = {settings.tracker: {"purge_step": step + 1}} if step else {}
        accelerator.init_trackers("training", init_kwargs=purge)


@contextlib.contextmanager
def noticing_sigterm() -> Iterator[Callable[[Accelerator], bool]]:
    """Yield a function that returns whether any process received SIGTERM; the signal itself interrupts nothing."""
    signals: list[int] = []

    def heard(accelerator: Accelerator) -> bool:
        if signals:
            accelerator.set_trigger()
        return accelerator.check_trigger()

    before = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)
