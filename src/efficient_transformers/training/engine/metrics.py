"""Metrics as `evaluate.Metric`s over scikit-learn and seqeval; `evaluate.load` would need a network connection."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
from seqeval.metrics import accuracy_score as tag_accuracy
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
from sklearn.metrics import accuracy_score, f1_score

from ...trust import ALLOW
from ..settings import InputError


class _Metric(evaluate.Metric):
    inputs: str
    prediction: Any  # datasets' features of one example
    reference: Any

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"predictions and references: {self.inputs}",
            features=datasets.Features({"predictions": self.prediction, "references": self.reference}),
        )


class Accuracy(_Metric):
    """Share of examples whose class is predicted correctly."""

    inputs, prediction, reference = "lists of class ids", datasets.Value("int64"), datasets.Value("int64")

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_Metric):
    """Mean of the F1 scores of the classes, so that rare classes count as much as frequent ones.

    Classes that occur neither as labels nor as predictions are ignored, as in scikit-learn.
    """

    inputs, prediction, reference = "lists of class ids", datasets.Value("int64"), datasets.Value("int64")

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division="warn"))}


class EntityF1(_Metric):
    """Precision, recall and F1 of entities, as in CoNLL 2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050).

    An entity is correct if its type and all of its words are; F1 is over all entities of all documents. `I-X` without
    an open entity of its type begins an entity. Tags without `B-` or `I-`, such as parts of speech, form an entity from
    each run of equal tags. Accuracy is the share of words with the correct tag.
    """

    inputs = "the tags of each document's words"
    prediction = reference = datasets.List(datasets.Value("string"))

    def _compute(
        self, *, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        pair = [[[_prefixed(tag) for tag in tags] for tags in rows] for rows in (references, predictions)]
        scores: Any = precision_recall_fscore_support(*pair, average="micro", zero_division=0)  # type: ignore[arg-type]
        precision, recall, f1, _ = map(float, scores)
        return {"f1": f1, "precision": precision, "recall": recall, "accuracy": float(tag_accuracy(*pair))}


def _prefixed(tag: str) -> str:
    # seqeval takes the first letter of any tag as its prefix
    return tag if tag == "O" or tag.startswith(("B-", "I-")) else f"I-{tag}"


class AnswerMatch(_Metric):
    """SQuAD scores (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1): exact match, and F1 of the common words.

    Both are means over the questions, with the best-matching reference for each. A question without references has no
    answer, which an empty prediction matches (SQuAD 2.0; Rajpurkar et al. 2018, arXiv:1806.03822).
    """

    inputs = "an answer to each question, and lists of correct answers"
    prediction, reference = datasets.Value("string"), datasets.List(datasets.Value("string"))

    def _compute(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        exact, overlap = 0.0, 0.0
        for prediction, answers in zip(predictions, references, strict=True):
            ours, theirs = _words(prediction), [_words(answer) for answer in answers or [""]]
            exact += ours in theirs
            overlap += max(_overlap_f1(ours, words) for words in theirs)
        return {"exact_match": exact / len(predictions), "f1": overlap / len(predictions)}


def _words(answer: str) -> list[str]:
    """Words normalised as in SQuAD: in lower case, without punctuation and articles."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", answer).split()


def _overlap_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


OWN_METRICS: dict[str, type[evaluate.Metric]] = {"accuracy": Accuracy, "macro_f1": MacroF1}


def check_trust(extra: Iterable[str], trust_remote_code: bool) -> None:
    """Raise InputError with the code of the metrics if `extra` metrics are named without trust."""
    if extra and not trust_remote_code:
        code = "; ".join(f"{name!r} ({place_of(name)})" for name in extra)
        raise InputError(f"extra_metrics can only be computed by running code that comes with them: {code}. {ALLOW}.")


def place_of(name: str) -> str:
    """Where `evaluate.load` finds the code of a metric."""
    for path in (Path(name), Path(name, f"{Path(name).name}.py")):
        if path.is_file():
            return f"the file {path}"
    return f"a file of {name if '/' in name else f'evaluate-metric/{name}'} on the Hub"


def load_metrics(
    extra: Iterable[str] = (), own: Iterable[str] = tuple(OWN_METRICS), trust_remote_code: bool = False
) -> list[evaluate.EvaluationModule]:
    """Load the built-in metrics and `extra` ones, whose code comes from a file or the Hub and runs if it is trusted."""
    check_trust(extra, trust_remote_code)
    # nothing is shared between processes: each computes the metrics of the gathered predictions
    metrics: list[evaluate.EvaluationModule] = [OWN_METRICS[name](keep_in_memory=True) for name in own]
    for name in extra:
        try:
            metrics.append(evaluate.load(name))
        except Exception as error:  # errors of the Hub have no common class
            raise InputError(
                f"The metric {name!r} of extra_metrics could not be loaded: {error}. "
                f"Without a network connection, omit it; {', '.join(OWN_METRICS)} are always computed."
            ) from error
    return metrics


def compute_metrics(
    metrics: Iterable[evaluate.EvaluationModule], predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in metrics:
        scores.update(metric.compute(predictions=predictions, references=references) or {})
    return scores
