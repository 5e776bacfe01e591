"""Train a model that selects one of several choices, evaluate it on the test split and save it for the Hub.

accelerate launch training/train.py --config configs/next.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/next-local [--max_length 512]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import (
    AutoModelForMultipleChoice,
    DataCollatorForMultipleChoice,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.coverage import Coverage
from ..data.excerpts import excerpts
from ..data.features import Features
from ..data.packing import check_offsets, shortened
from ..data.texts import Row, TextSettings, load_splits, text_of, value_of
from ..engine.scoring import LabelScorer
from ..engine.task import Source, Task
from ..settings import InputError, ranged


@dataclass
class ChooseSettings(TextSettings):
    """Settings for contexts and choices."""

    examples: Literal["columns", "next"] = "columns"  # next: derived from the text column, see `next_excerpts`
    context_column: str = "context"
    question_column: str | None = None  # added before every choice
    choices_column: str = "choices"  # a list of texts
    choice_columns: list[str] | None = None  # or one column for each choice, such as SWAG's ending0 to ending3
    label_column: str = "label"  # the correct choice: its number from 0, or its letter from A
    # tokens of question and choice together; longer ones are truncated
    max_choice_length: int = ranged(256, least=1)
    keep: Literal["start", "end"] = "start"  # part to keep of a context that is too long
    context_words: int = ranged(300, least=1)  # minimum number of words before the choice
    choice_words: int = ranged(60, least=1)
    num_choices: int = ranged(4, least=2)


@dataclass
class Choice:
    context: str
    choices: list[str]
    label: int


def load_choices(settings: ChooseSettings) -> dict[str, list[Choice]]:
    """Load all three splits, and check that all examples have the same number of choices."""
    if settings.examples == "next":
        texts = load_splits(settings, lambda row: text_of(row, settings))
        return {
            name: next_excerpts(texts[name], np.random.default_rng((settings.split_seed, split)), settings)
            for split, name in enumerate(texts)
        }
    splits = load_splits(settings, lambda row: _choice(row, settings), label_column=settings.label_column)
    counts = sorted({len(choice.choices) for split in splits.values() for choice in split})
    if len(counts) > 1:
        raise InputError(f"Every example must have the same number of choices, but the numbers are {counts}.")
    return splits


def _choice(row: Row, settings: ChooseSettings) -> Choice:
    place, columns = row
    context = value_of(row, "context_column", settings)
    question = "" if settings.question_column is None else value_of(row, "question_column", settings)
    if settings.choice_columns is None:
        choices = value_of(row, "choices_column", settings)
    elif missing := [name for name in settings.choice_columns if name not in columns]:
        raise InputError(f"{place[0].upper()}{place[1:]} has no columns {missing}: correct choice_columns.")
    else:
        choices = [columns[name] for name in settings.choice_columns]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"There must be a list of at least two choices, but {place} has {choices!r}.")
    for text in (context, question, *choices):
        if not isinstance(text, str):
            raise InputError(f"Context, question and choices must be text, but {place} has {text!r}.")
    return Choice(
        context, [f"{question} {choice}".strip() for choice in choices], _label_of(row, len(choices), settings)
    )


def _label_of(row: Row, count: int, settings: ChooseSettings) -> int:
    label = value_of(row, "label_column", settings)
    text = str(label).strip()
    number = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not 0 <= number < count:
        raise InputError(
            f"The column {settings.label_column!r} must name one of {count} choices by its number, from 0 to "
            f"{count - 1}, or by its letter, from A to {chr(ord('A') + count - 1)}, but {row[0]} has {label!r}."
        )
    return number


def next_excerpts(texts: Sequence[str], rng: np.random.Generator, settings: ChooseSettings) -> list[Choice]:
    """Examples that ask for the next excerpt, among excerpts of other texts; all consist of whole sentences.

    A text is cut into pieces with the length of a choice. Enough pieces for a context are followed by the correct
    choice. The wrong ones are random pieces of other texts in the same split.
    """
    pieces = [excerpts(text, settings.choice_words) for text in texts]
    many = -(-settings.context_words // settings.choice_words)  # pieces per context
    elsewhere = [(text, piece) for text, own in enumerate(pieces) for piece in own]
    owners = np.array([text for text, _ in elsewhere])
    found = []
    for text, own in enumerate(pieces):
        others = np.flatnonzero(owners != text)
        if len(others) < settings.num_choices - 1:
            raise InputError(
                f"{len(others)} excerpts of other documents are too few for num_choices ({settings.num_choices}): "
                "add documents, or reduce num_choices or choice_words."
            )
        for start in range(0, len(own) - many, many + 1):
            wrong = [elsewhere[i][1] for i in rng.choice(others, settings.num_choices - 1, replace=False)]
            label = int(rng.integers(settings.num_choices))
            choices = [*wrong[:label], own[start + many], *wrong[label:]]
            found.append(Choice(" ".join(own[start : start + many]), choices, label))
    return found


def choice_rows(
    examples: list[Choice],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: ChooseSettings,
    model: PreTrainedModel,
) -> Features:
    """Pairs of the context and each choice."""
    check_offsets(tokenizer, "Choices")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - settings.max_choice_length
    if room < 1:
        raise InputError(
            f"max_length ({max_length}) leaves no room for a context next to max_choice_length "
            f"({settings.max_choice_length}) and the special tokens: increase the first or reduce the second."
        )
    rows, coverage = [], Coverage()
    for example in examples:
        pairs = [shortened(choice, tokenizer, settings.max_choice_length) for choice in example.choices]
        choices = [choice for choice, _ in pairs]
        context, tokens = shortened(example.context, tokenizer, room, settings.keep)
        of_choices = [tokens for _, tokens in pairs]
        seen = [min(tokens, settings.max_choice_length) for tokens in of_choices]
        coverage.add(tokens + sum(of_choices), min(tokens, room) + sum(seen))
        encoded = tokenizer(
            [context] * len(choices),
            choices,
            truncation="longest_first",  # truncated texts may have one token more when encoded again
            max_length=max_length,
            return_attention_mask=False,
        )
        rows.append({**encoded, "labels": example.label})
    return Features(rows, coverage=coverage)


class ChoiceScorer(LabelScorer):
    names = ("accuracy",)  # the number of the correct choice is not a class


class ChooseTask(Task[ChooseSettings]):
    name = "choose"
    settings_class = ChooseSettings
    auto_class = AutoModelForMultipleChoice
    task_type = "multiple-choice"
    unit = "examples"
    collate = DataCollatorForMultipleChoice
    scorer = ChoiceScorer
    purpose = "A multiple-choice model: it reads a context with each of several choices and selects one."

    def load(self, settings: ChooseSettings) -> Source:
        return Source.of_texts(settings, load_choices, choice_rows)

    def limits(self, settings: ChooseSettings) -> list[str]:
        made = "It was trained to distinguish the continuation of a text from excerpts of other texts, by any clue: "
        made += "topic, time and style as well as content."
        always = "It always selects one of the choices, even if none is correct."
        return [made if settings.examples == "next" else always]


TASK = ChooseTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
