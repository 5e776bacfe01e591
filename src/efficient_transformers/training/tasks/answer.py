"""Train a model that finds the answer to a question in a long text, evaluate it on the test split and save it.

accelerate launch training/train.py --config configs/facts.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/facts-local [--max_length 512]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.coverage import Coverage
from ..data.excerpts import sentences
from ..data.features import Features
from ..data.packing import check_offsets, shortened
from ..data.texts import Row, TextSettings, load_splits, text_of, value_of
from ..engine.metrics import AnswerMatch, compute_metrics
from ..engine.scoring import Scorer
from ..engine.task import Source, Task
from ..settings import InputError, ranged

NAMES = (
    "Adams", "Baker", "Carter", "Dalton", "Ellis", "Foster", "Grant", "Hayes", "Irving", "Jordan", "Keller", "Logan",
    "Mason", "Nelson", "Owens", "Parker", "Quincy", "Reeves", "Sawyer", "Turner", "Upton", "Vernon", "Walker", "York",
)  # fmt: skip


@dataclass
class AnswerSettings(TextSettings):
    """Settings for questions and contexts."""

    examples: Literal["columns", "needle"] = "columns"  # needle: derived from the text column, see `plant`
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"  # as in SQuAD: {"text": [...], "answer_start": [...]}, characters from 0
    null_answers: bool = False  # questions may have no answer, as in SQuAD 2.0
    null_threshold: float = ranged(0.0)  # log-odds against "no answer" required for an answer
    # tokens that a window of a long context shares with the previous one
    stride: int = ranged(128, least=0, why="0 makes windows without overlap")
    max_question_length: int = ranged(64, least=1)  # tokens; longer questions are truncated
    max_answer_length: int = ranged(30, least=1)  # tokens; maximum length of a predicted span
    mark_question: bool = True  # its tokens are global in variants with marked global tokens (Longformer, section 3.1)
    needle_words: int = ranged(600, least=1)  # words of text around the needle
    needles_per_document: int = ranged(4, least=1)  # questions, each with its own excerpt
    # facts of the same form about other names, so that the question matters
    distractors: int = ranged(0, least=0, most=len(NAMES) - 1, why="there are no more names")


@dataclass
class Question:
    """`answers` are all correct answers, and `starts` their positions in the context; empty if there is no answer."""

    question: str
    context: str
    answers: list[str]
    starts: list[int]


def load_questions(settings: AnswerSettings) -> dict[str, list[Question]]:
    """Load all three splits. Needles are inserted after the data is split, so no text is in two splits."""
    if settings.examples == "columns":
        return load_splits(settings, lambda row: _question(row, settings), label_column=settings.answers_column)
    texts = load_splits(settings, lambda row: text_of(row, settings))
    return {
        name: [
            plant(text, np.random.default_rng((settings.split_seed, split, document, n)), settings)
            for document, text in enumerate(texts[name])
            for n in range(settings.needles_per_document)
        ]
        for split, name in enumerate(texts)
    }


def _question(row: Row, settings: AnswerSettings) -> Question:
    place, _ = row
    question, context = (value_of(row, f"{name}_column", settings) for name in ("question", "context"))
    answers = value_of(row, "answers_column", settings)
    for name, value in ((settings.question_column, question), (settings.context_column, context)):
        if not isinstance(value, str):
            raise InputError(f"The column {name!r} must be text, but {place} has {value!r}.")
    form = "{'text': [...], 'answer_start': [...]} with lists of equal length"
    texts, starts = (answers.get(key) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        raise InputError(f"The column {settings.answers_column!r} must be {form}, but {place} has {answers!r}.")
    if not texts and not settings.null_answers:
        raise InputError(
            f"{place[0].upper()}{place[1:]} has no answer: set null_answers to true if questions may have none."
        )
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            raise InputError(
                f"The answer {text!r} of {place} is not in the context at character {start}, which has "
                f"{context[start : start + len(text)]!r}: correct answer_start."
            )
    return Question(question, context, texts, starts)


def plant(text: str, rng: np.random.Generator, settings: AnswerSettings) -> Question:
    """Insert `The code of <name> is <number>.` after a random sentence of a random excerpt, and ask for the number."""
    lines = sentences(text) or [text]
    words = np.cumsum([0, *(len(line.split()) for line in lines)])  # before each sentence, and in total
    # the excerpt begins where enough words follow, if there are that many
    first = int(rng.integers(max(1, np.searchsorted(words, words[-1] - settings.needle_words, side="right"))))
    last = int(np.searchsorted(words, words[first] + settings.needle_words, side="right")) - 1
    lines = lines[first : max(last, first + 1)]
    names = rng.choice(NAMES, settings.distractors + 1, replace=False)
    codes = rng.choice(np.arange(1000, 10_000), len(names), replace=False)
    facts = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    for fact in facts:
        lines.insert(int(rng.integers(len(lines) + 1)), fact)
    context = " ".join(lines)
    answer = str(codes[0])
    start = context.index(facts[0]) + len(facts[0]) - len(answer) - 1
    return Question(f"What is the code of {names[0]}?", context, [answer], [start])


@dataclass
class Window:
    """Origin of a window's tokens: offsets[i] are the characters of token `first + i` in the context."""

    example: int
    first: int
    offsets: np.ndarray


def answer_windows(
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: AnswerSettings,
    model: PreTrainedModel,
) -> Features:
    """Windows with the question and a part of the context; windows of one context share `stride` tokens.

    If a window does not contain the whole (first) answer, both positions are 0, the first token, which represents "no
    answer" (Devlin et al. 2018, arXiv:1810.04805, section 4.3).
    """
    check_offsets(tokenizer, "Answers")
    added = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - settings.max_question_length - added
    if room <= settings.stride:
        raise InputError(
            f"max_length ({max_length}) leaves {room} tokens for the context next to max_question_length "
            f"({settings.max_question_length}) and {added} special tokens, but stride ({settings.stride}) must be "
            "less: increase max_length or reduce the others."
        )
    longest = settings.max_question_length
    pairs = [shortened(question.question.strip(), tokenizer, longest) for question in questions]
    cut, asked = [text for text, _ in pairs], [tokens for _, tokens in pairs]
    of_contexts = [0] * len(questions)  # tokens, all of which are in some window
    marks = settings.mark_question and takes_marks(model)
    rows, windows = [], []
    for start in range(0, len(questions), 64):
        batch = questions[start : start + 64]
        encoded = tokenizer(
            cut[start : start + 64],
            [question.context for question in batch],
            truncation="only_second",
            max_length=max_length,
            stride=settings.stride,
            return_overflowing_tokens=True,
            return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        )
        for index, encoding in enumerate(encoded.encodings or []):
            example = start + encoded["overflow_to_sample_mapping"][index]
            of_context = np.array([sequence == 1 for sequence in encoding.sequence_ids])
            if not of_context.any():
                continue
            first = int(of_context.argmax())
            window = Window(example, first, np.array(encoding.offsets)[of_context])
            shared = settings.stride if of_contexts[example] else 0
            of_contexts[example] += int(of_context.sum()) - shared
            begin, end = positions(questions[example], window)
            row = {"input_ids": np.array(encoding.ids, dtype=np.int32), "start_positions": begin, "end_positions": end}
            if "token_type_ids" in encoded:
                row["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int32)
            if marks:
                row["global_attention_mask"] = (np.arange(len(encoding.ids)) < first).astype(np.int32)
            rows.append(row)
            windows.append(window)
    coverage = Coverage()
    for question, context in zip(asked, of_contexts, strict=True):
        coverage.add(question + context if context else 0, min(question, longest) + context if context else 0)
    return Features(rows, windows, questions, coverage)


def collate_answers(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Return a collate function that pads on the right, because positions count from the start; it also pads marks."""
    fill: dict[str, Any] = {"input_ids": tokenizer.pad_token_id}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {}
        for key in rows[0]:
            values = [torch.as_tensor(row[key]) for row in rows]
            is_row = values[0].ndim == 1
            batch[key] = pad_sequence(values, True, fill.get(key, 0)) if is_row else torch.stack(values)
        ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
        return {**batch, "attention_mask": pad_sequence(ones, True)}

    return collate


def takes_marks(model: PreTrainedModel) -> bool:
    return getattr(model.base_model, "has_marked_tokens", False) and not model.config.is_decoder


def positions(question: Question, window: Window) -> tuple[int, int]:
    """First and last token of the answer in this window, or 0 and 0."""
    if not question.answers:
        return 0, 0
    begin, end = question.starts[0], question.starts[0] + len(question.answers[0])
    starts, ends = window.offsets.T
    if begin < starts[0] or end > ends[-1]:
        return 0, 0
    # byte-level tokens may begin with the space before the answer, and some extend beyond its end
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, end, side="left"))
    return window.first + first, window.first + last


def best_span(start: np.ndarray, end: np.ndarray, window: Window, longest: int) -> tuple[float, int, int]:
    """The most likely answer in a window, given its logits: log-odds against "no answer", and its characters."""
    count, first = len(window.offsets), window.first
    null = start[0] + end[0]
    start, end = start[first : first + count], end[first : first + count]
    longest = min(longest, count)
    # ends[i, l] is the end logit of token i + l
    ends = np.lib.stride_tricks.sliding_window_view(np.pad(end, (0, longest - 1), constant_values=-np.inf), longest)
    scores = start[:, None] + ends
    token, length = np.unravel_index(scores.argmax(), scores.shape)
    return (
        float(scores[token, length] - null),
        int(window.offsets[token][0]),
        int(window.offsets[token + length][1]),
    )


def answers_of(
    spans: Sequence[tuple[float, int, int]], windows: Sequence[Window], questions: Sequence[Question], settings: Any
) -> list[str]:
    """The answer to each question, from the best span of each window.

    Log-odds are compared across windows, not sums of logits as in BERT's script (the paper has one window): a softmax
    is over one window, so that only the difference from its own "no answer" is comparable between windows.
    """
    best: dict[int, tuple[float, int, int]] = {}
    for span, window in zip(spans, windows, strict=True):
        if window.example not in best or span > best[window.example]:
            best[window.example] = span
    given = []
    for index, question in enumerate(questions):
        score, begin, end = best.get(index, (-np.inf, 0, 0))
        is_null = settings.null_answers and score <= settings.null_threshold
        given.append("" if is_null else question.context[begin:end].strip())
    return given


Logits = tuple[np.ndarray, np.ndarray]  # start and end logits of a window


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
        answers = [question.answers for question in self.data.shared]
        losses = [window_loss(*logits, row) for logits, row in zip(found, self.data.rows, strict=True)]
        return {
            "loss": sum(losses) / len(losses),
            **compute_metrics([AnswerMatch(keep_in_memory=True)], given, answers),
        }


def window_loss(starts: np.ndarray, ends: np.ndarray, row: Mapping[str, Any]) -> float:
    """Mean cross-entropy of both positions in nats, without the padding of the batch."""
    both = ((starts, row["start_positions"]), (ends, row["end_positions"]))
    length = len(row["input_ids"])
    return sum(float(np.logaddexp.reduce(logits[:length]) - logits[position]) / 2 for logits, position in both)


class AnswerTask(Task[AnswerSettings]):
    name = "answer"
    settings_class = AnswerSettings
    auto_class = AutoModelForQuestionAnswering
    task_type = "question-answering"
    unit = "windows"
    collate = staticmethod(collate_answers)
    scorer = AnswerScorer
    purpose = "An extractive question-answering model: it finds the answer to a question as a span of a text."

    def load(self, settings: AnswerSettings) -> Source:
        return Source.of_texts(settings, load_questions, answer_windows)

    def build_config(
        self, settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase | None, **fields: Any
    ) -> PreTrainedConfig:
        """Store the token that ends the question in Longformer's config, so that the saved model marks it itself."""
        config = super().build_config(settings, tokenizer, **fields)
        if tokenizer is not None and getattr(config, "sep_token_id", 0) is None and settings.mark_question:
            config.sep_token_id = tokenizer.sep_token_id
        return config

    def limits(self, settings: AnswerSettings) -> list[str]:
        needle = "Its questions ask for one kind of sentence, inserted at random into real text; it answers no others."
        return [
            f"Its answers are spans of at most {settings.max_answer_length} tokens.",
            *([needle] if settings.examples == "needle" else []),
            *([] if settings.null_answers else ["It always returns an answer, even if the text has none."]),
        ]


TASK = AnswerTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
