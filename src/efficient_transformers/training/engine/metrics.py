"""Metrics as `evaluate.Metric`s of our own over scikit-learn: `evaluate.load` fetches its code from the network."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score

from ..settings import InputError


class _Metric(evaluate.Metric):
    """A metric of something predicted and something true per example, both of the same kind."""

    inputs: str
    kind: Any

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"predictions and references: {self.inputs}",
            features=datasets.Features({"predictions": self.kind, "references": self.kind}),
        )


class _LabelMetric(_Metric):
    """A metric of one predicted and one true class per example."""

    inputs, kind = "lists of class ids", datasets.Value("int64")


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


class EntityF1(_Metric):
    """Precision, recall and F1 of entities, as in CoNLL 2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050).

    An entity counts as found if its words and its type are right, all of them; the F1 is over all entities of all
    documents. Accuracy is the share of the words whose tag is right.
    """

    inputs, kind = "the tags of each document's words", datasets.List(datasets.Value("string"))

    def _compute(
        self, *, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        pairs = [
            (set(entities(ours)), set(entities(theirs))) for ours, theirs in zip(predictions, references, strict=True)
        ]
        right = sum(len(ours & theirs) for ours, theirs in pairs)
        precision = _share(right, sum(len(ours) for ours, _ in pairs))
        recall = _share(right, sum(len(theirs) for _, theirs in pairs))
        words = [ours == theirs for rows in zip(predictions, references, strict=True)
                 for ours, theirs in zip(*rows, strict=True)]  # fmt: skip
        return {
            "f1": _share(2 * precision * recall, precision + recall),
            "precision": precision,
            "recall": recall,
            "accuracy": _share(sum(words), len(words)),
        }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities that a sequence of tags names, as (type, first word, word behind the last).

    `B-X` begins an entity of type X, `I-X` goes on with one, or begins one where none of its type is open, as the
    script of CoNLL 2000 reads it. A tag without such a mark, like a part of speech, goes on with itself. `O` is none.
    """
    found, begin, current = [], 0, None
    for word, tag in enumerate([*tags, "O"]):
        mark, dash, kind = tag.partition("-")
        if not (dash and mark in ("B", "I")):
            mark, kind = "I", None if tag == "O" else tag
        if current is not None and (kind != current or mark == "B"):
            found.append((current, begin, word))
        if kind != current or mark == "B":
            begin, current = word, kind
    return found


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


OWN_METRICS: dict[str, type[evaluate.Metric]] = {"accuracy": Accuracy, "macro_f1": MacroF1}


def load_metrics(extra: Iterable[str] = (), own: Iterable[str] = tuple(OWN_METRICS)) -> list[evaluate.EvaluationModule]:
    """Our own metrics, and those that the user names, which come from the Hub."""
    # nothing is shared between processes: every one computes the metrics of the gathered predictions
    metrics: list[evaluate.EvaluationModule] = [OWN_METRICS[name](keep_in_memory=True) for name in own]
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
