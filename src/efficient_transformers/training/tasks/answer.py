"""Trains a model that finds the answer to a question in a long text, evaluates it on the test split and saves it.

accelerate launch training/answer.py --config configs/facts/local.yaml [key=value …] [--resume]
python training/answer.py --evaluate runs/facts-local [max_length=512]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedTokenizerBase

from ..engine.command_line import command_line
from ..engine.task import Scorer, Source, Task
from .answering import (
    AnswerSettings,
    answer_windows,
    answers_of,
    best_span,
    collate_answers,
    exact_match,
    load_questions,
    overlap_f1,
)

Logits = tuple[np.ndarray, np.ndarray]  # of a window's starts and ends


class AnswerScorer(Scorer):
    """Loss of the windows; exact match and F1 of the questions, each answered from all windows of its context."""

    names = ("exact_match", "f1")

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Logits]:
        starts, ends = (logits.float().cpu().numpy() for logits in (outputs.start_logits, outputs.end_logits))
        return list(zip(starts, ends, strict=True))

    def scores(self, found: list[Logits]) -> dict[str, float]:
        longest = self.settings.max_answer_length
        spans = [best_span(*logits, window, longest) for logits, window in zip(found, self.data.notes, strict=True)]
        given = answers_of(spans, self.data.notes, self.data.shared, self.settings)
        pairs = [(ours, question.answers) for ours, question in zip(given, self.data.shared, strict=True)]
        losses = [window_loss(*logits, row) for logits, row in zip(found, self.data.rows, strict=True)]
        return {
            "loss": sum(losses) / len(losses),
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "f1": sum(overlap_f1(*pair) for pair in pairs) / len(pairs),
        }


def window_loss(starts: np.ndarray, ends: np.ndarray, row: Mapping[str, Any]) -> float:
    """Mean of the nats of both positions, without what pads a window to the others of its batch."""
    both = ((starts, row["start_positions"]), (ends, row["end_positions"]))
    length = len(row["input_ids"])
    return sum(float(np.logaddexp.reduce(logits[:length]) - logits[position]) / 2 for logits, position in both)


class AnswerTask(Task[AnswerSettings]):
    script = "answer.py"
    settings_class = AnswerSettings
    auto_class = AutoModelForQuestionAnswering
    task_type = "question-answering"
    unit = "windows"
    collate = staticmethod(collate_answers)
    scorer = AnswerScorer
    purpose = "A reader: it finds the answer to a question as a span of a text."

    def load(self, settings: AnswerSettings) -> Source:
        return Source.of_texts(settings, load_questions, answer_windows)

    def build_config(
        self, settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase | None, **fields: Any
    ) -> PreTrainedConfig:
        """Longformer's config knows the token that ends the question, so that the saved model marks it by itself."""
        config = super().build_config(settings, tokenizer, **fields)
        if tokenizer is not None and getattr(config, "sep_token_id", 0) is None and settings.mark_question:
            config.sep_token_id = tokenizer.sep_token_id
        return config

    def limits(self, settings: AnswerSettings) -> list[str]:
        needle = "Its questions ask for one kind of sentence, hidden at random in real text: it answers no other ones."
        return [
            f"It gives a span of at most {settings.max_answer_length} tokens of the text, and none that is longer.",
            *([needle] if settings.examples == "needle" else []),
            *([] if settings.null_answers else ["It always gives an answer, also where the text has none."]),
        ]


TASK = AnswerTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder


def main(arguments: list[str] | None = None) -> None:
    command_line(TASK.script, __doc__, TASK.settings_class, run, evaluate_folder, arguments)
