"""Scores of a model on one split: an evaluator for all tasks, and the scorers of tasks."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.packing import IGNORED
from .batches import make_loader
from .metrics import OWN_METRICS, check_trust, compute_metrics, load_metrics
from .progress import progress_bar


class Scorer:
    """Compute scores of one split: first a finding per example, then the scores from all findings."""

    names: ClassVar[tuple[str, ...]]  # scores that `best_metric` may name, besides the loss

    def __init__(self, data: Any, settings: Any):
        self.data, self.settings = data, settings

    @classmethod
    def all_names(cls, settings: Any) -> tuple[str, ...]:
        return ("loss", *cls.names)

    @classmethod
    def check(cls, settings: Any) -> None:
        """Raise InputError, before anything is loaded, if the settings name metrics that cannot be computed."""

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """A finding for each example of a batch, without tensors, so that it can be gathered from all processes."""
        raise NotImplementedError

    def scores(self, found: list[Any]) -> dict[str, float]:
        """Scores from the findings of all examples, in the order of the data."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """Number of examples behind the scores, for `metrics.json`."""
        return {"n": len(self.data)}


class LabelScorer(Scorer):
    """Loss and metrics of examples with one label each; users add `extra_metrics` in the settings."""

    names = tuple(OWN_METRICS)

    def __init__(self, data: Any, settings: Any):
        super().__init__(data, settings)
        self.metrics = load_metrics(
            getattr(settings, "extra_metrics", ()), self.names, trust_remote_code=settings.trust_remote_code
        )

    @classmethod
    def all_names(cls, settings: Any) -> tuple[str, ...]:
        return (*super().all_names(settings), *getattr(settings, "extra_metrics", ()))

    @classmethod
    def check(cls, settings: Any) -> None:
        check_trust(getattr(settings, "extra_metrics", ()), settings.trust_remote_code)

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[float, int, int]]:
        """Loss, predicted class and true class."""
        logits, labels = outputs.logits.float(), batch["labels"]
        losses = cross_entropy(logits, labels, reduction="none")
        return list(zip(losses.tolist(), logits.argmax(-1).tolist(), labels.tolist(), strict=True))

    def scores(self, found: list[tuple[float, int, int]]) -> dict[str, float]:
        losses, predictions, references = zip(*found, strict=True)
        return {"loss": sum(losses) / len(losses), **compute_metrics(self.metrics, predictions, references)}


class TokenScorer(Scorer):
    """Loss and accuracy at the labelled tokens of a split, with equal weight for each token."""

    names = ("accuracy",)

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[list[float]]:
        windows = zip(outputs.logits, batch["labels"], strict=True)
        return torch.stack([token_sums(*self.aligned(*window)) for window in windows]).tolist()

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (n, v) of a window and the labels (n,) that they predict."""
        return logits, labels

    def scores(self, found: list[list[float]]) -> dict[str, float]:
        loss, right, labelled = map(math.fsum, zip(*found, strict=True))
        return {"loss": loss / labelled, "accuracy": right / labelled}


class NextTokenScorer(TokenScorer):
    """Loss and accuracy where each token is predicted from the earlier ones."""

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:-1], labels[1:]


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss in nats, number of correct predictions and number of labelled tokens of one window, (3,)."""
    labelled = labels != IGNORED
    logits, targets = logits[labelled].float(), labels[labelled]
    loss, right = cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1) == targets
    return torch.stack([loss, right.sum(), labelled.sum()])


class Evaluator:
    """Scores of a model on the scorer's split, over all processes. Collective: call it on every rank."""

    def __init__(self, accelerator: Accelerator, scorer: Scorer, collate: Any, batch_size: int):
        self.accelerator, self.scorer = accelerator, scorer
        self.loader = accelerator.prepare(make_loader(scorer.data, collate, batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        found: list[Any] = []
        bar = progress_bar("evaluating", len(self.loader), shown=self.accelerator.is_main_process, leave=False)
        for batch in self.loader:
            # with labels, the model would compute a loss that is not used
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
            findings: Any = self.scorer.judge(outputs, batch)
            found += self.accelerator.gather_for_metrics(findings, use_gather_object=True)
            bar.update()
        bar.close()
        assert len(found) == len(self.scorer.data)
        return self.scorer.scores(found)
