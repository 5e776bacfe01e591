"""Metrics as `evaluate.Metric`s of our own over scikit-learn: `evaluate.load` fetches its code from the network."""

from collections.abc import Iterable, Sequence

import datasets
import evaluate
from settings import InputError
from sklearn.metrics import accuracy_score, f1_score


class _LabelMetric(evaluate.Metric):
    """A metric of one predicted and one true class per example."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: lists of class ids",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )


class Accuracy(_LabelMetric):
    """Share of the examples whose class is predicted."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_LabelMetric):
    """Mean of the classes' F1, so that a rare class counts as much as a frequent one.

    Classes that are neither true nor predicted anywhere do not count, as in scikit-learn.
    """

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division="warn"))}


OWN_METRICS: dict[str, type[evaluate.Metric]] = {"accuracy": Accuracy, "macro_f1": MacroF1}


def load_metrics(extra: Iterable[str] = ()) -> list[evaluate.EvaluationModule]:
    """Our own metrics, and those that the user names, which come from the Hub."""
    # nothing is shared between processes: every one computes the metrics of the gathered predictions
    metrics: list[evaluate.EvaluationModule] = [metric(keep_in_memory=True) for metric in OWN_METRICS.values()]
    for name in extra:
        try:
            metrics.append(evaluate.load(name))
        except Exception as error:  # the Hub's failures have no common class
            raise InputError(
                f"The metric {name!r} of extra_metrics could not be loaded from the Hub: {error}. "
                f"Without a network leave it out; {', '.join(OWN_METRICS)} are always computed."
            ) from error
    return metrics


def compute_metrics(
    metrics: Iterable[evaluate.EvaluationModule], predictions: Sequence[int], references: Sequence[int]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in metrics:
        scores.update(metric.compute(predictions=predictions, references=references) or {})
    return scores
