"""The training loop that every task shares: accumulate, clip, evaluate, keep the best, save, stop, continue."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from checkpoints import PARTIAL, Checkpoints, Progress
from outputs import CHECKPOINTS
from safetensors.torch import load_model, save_model
from settings import InputError, Settings
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices


class Stopped(Exception):
    """SIGTERM was heard; the state is saved."""


class EpochSampler(Sampler[int]):
    """An order of the examples that follows from the seed and the epoch alone, so that it can be taken up again."""

    def __init__(self, size: int, seed: int, lengths: list[int] | None = None, batch_size: int = 1):
        self.size, self.seed, self.lengths, self.batch_size, self.epoch = size, seed, lengths, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def make_loader(data: Any, collate: Any, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader:
    # a loader draws from its generator at every start; from the global one, evaluating would change the dropout
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, sampler=sampler, collate_fn=collate, generator=generator)


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW; biases and norms, the parameters of one axis, do not decay. New weights may have a rate of their own."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            is_new = getattr(parameter, "made_anew", False)
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
    lengths: Sequence[int],
    collate: Any,
    evaluate: Callable[[torch.nn.Module], dict[str, float]],
) -> tuple[torch.nn.Module, Progress]:
    """Trains to the end, or saves and raises Stopped on SIGTERM; returns the prepared model with its best weights.

    Dropout, order of the data, schedule and moments are part of a checkpoint: a run that was killed and continued ends
    with the same weights, bit for bit, as one that never stopped. Examples that draw must do so from the seed, the
    epoch (they are told by `data.set_epoch`) and their index: a loader reads ahead of the state that is saved.
    """
    checkpoints = Checkpoints(settings.folder / CHECKPOINTS, settings.keep_checkpoints, accelerator)
    grouped = list(lengths) if settings.sort_by_length else None
    sampler = EpochSampler(len(lengths), settings.seed, grouped, settings.batch_size)
    loader = make_loader(data, collate, settings.batch_size, sampler)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model, settings), loader)

    total = settings.max_steps or settings.epochs * math.ceil(len(loader) / settings.gradient_accumulation)
    # not prepared: accelerate would step it once per process, and the steps counted here are optimiser steps
    schedule = get_scheduler(settings.schedule, optimizer, math.ceil(settings.warmup_ratio * total), total)
    accelerator.register_for_checkpointing(schedule)
    progress = checkpoints.load()
    if progress.step:
        accelerator.print(f"Continuing after step {progress.step} of {total}.")
    start_tracker(accelerator, settings, progress.step)
    if settings.eval_first and progress.before is None:
        progress.before = evaluate(model)
        record_scores(accelerator, 0, progress.before, "before training")

    def over() -> bool:
        return progress.step >= total or (settings.patience is not None and progress.without_gain >= settings.patience)

    totals = torch.zeros(3, device=accelerator.device)  # of this step: loss, batches, tokens
    visible = accelerator.is_main_process and sys.stderr.isatty()
    with (
        tqdm(total=total, initial=progress.step, desc="training", disable=not visible) as bar,
        noticing_sigterm() as heard,
    ):
        while not over():
            model.train()
            began = time.perf_counter()
            for batch in batches_of_epoch(loader, sampler, progress):
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                totals += torch.stack(
                    [loss.detach().float(), totals.new_ones(()), batch["attention_mask"].sum().float()]
                )
                progress.batch += 1
                if not accelerator.sync_gradients:
                    continue

                if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
                    schedule.step()
                epoch_ended = accelerator.gradient_state.end_of_dataloader
                mean_loss = record_step(accelerator, progress, totals, epoch_ended)
                progress.seconds += time.perf_counter() - began
                bar.update()
                bar.set_postfix(loss=f"{mean_loss:.3f}")
                if progress.step % settings.log_steps == 0 or progress.step == total:
                    rates = {"train/loss": mean_loss, "train/learning_rate": schedule.get_last_lr()[0]}
                    accelerator.log(rates | {"train/tokens": progress.tokens}, step=progress.step)
                every = settings.eval_steps
                evaluated = progress.step == total or (progress.step % every == 0 if every else epoch_ended)
                if evaluated:
                    scores = evaluate(model)
                    judge(accelerator, settings, progress, scores, model, checkpoints)
                    model.train()
                every = settings.checkpoint_steps
                if (progress.step % every == 0 if every else evaluated) or over():
                    checkpoints.save(progress)
                if heard(accelerator) and not over():
                    checkpoints.save(progress)
                    accelerator.end_training()
                    raise Stopped
                if over():
                    break
                began = time.perf_counter()
    load_model(accelerator.unwrap_model(model), checkpoints.best_weights)
    return model, progress


def batches_of_epoch(loader: Any, sampler: EpochSampler, progress: Progress) -> Any:
    """The batches of the current epoch that are still to be seen."""
    loader.set_epoch(progress.epoch)
    # accelerate reaches neither of these through the wrappers of several processes
    sampler.set_epoch(progress.epoch)
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(progress.epoch)
    return skip_first_batches(loader, progress.batch) if progress.batch else loader


def record_step(accelerator: Accelerator, progress: Progress, totals: torch.Tensor, epoch_ended: bool) -> float:
    """Counts one optimiser step, empties `totals` and returns the mean loss of all processes."""
    summed: Any = accelerator.reduce(totals, reduction="sum")
    loss, batches, tokens = summed.tolist()
    totals.zero_()
    progress.step += 1
    progress.tokens += round(tokens)
    if epoch_ended:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    if not math.isfinite(loss):
        raise InputError(
            f"The loss of step {progress.step} is {loss}: training has diverged. The checkpoints before it are kept; "
            "lower learning_rate, raise warmup_ratio or use mixed_precision=no."
        )
    return loss / batches


def judge(
    accelerator: Accelerator,
    settings: Settings,
    progress: Progress,
    scores: dict[str, float],
    model: torch.nn.Module,
    checkpoints: Checkpoints,
) -> None:
    """Records an evaluation, and keeps the weights if they are the best yet."""
    if settings.best_metric not in scores:
        raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(scores)}.")
    score = scores[settings.best_metric]
    sign = -1 if settings.best_metric == "loss" else 1
    gained = progress.best is None or sign * score > sign * progress.best
    if gained:
        progress.best, progress.best_step, progress.without_gain = score, progress.step, 0
        if accelerator.is_main_process:
            checkpoints.folder.mkdir(parents=True, exist_ok=True)
            partial = checkpoints.best_weights.with_suffix(PARTIAL)
            save_model(accelerator.unwrap_model(model), str(partial))
            partial.replace(checkpoints.best_weights)
        accelerator.wait_for_everyone()
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
        # what was logged after the checkpoint is written again
        purge = {settings.tracker: {"purge_step": step + 1}} if step else {}
        accelerator.init_trackers("training", init_kwargs=purge)


@contextlib.contextmanager
def noticing_sigterm() -> Iterator[Callable[[Accelerator], bool]]:
    """Gives a function that says whether any process has got SIGTERM; the signal itself interrupts nothing."""
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
