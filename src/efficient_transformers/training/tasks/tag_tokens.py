"""Train a word tagger, evaluate it on the test split and save it for the Hub.

accelerate launch training/train.py --config configs/case.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/case-local [--max_length 512]
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.coverage import Coverage
from ..data.excerpts import ends_sentence
from ..data.features import Features
from ..data.packing import IGNORED, check_offsets, encoded, overlapping_slices, special_frame
from ..data.texts import Row, TextSettings, load_splits, text_of, value_of
from ..engine.metrics import EntityF1, compute_metrics
from ..engine.scoring import Scorer
from ..engine.task import Source, Task
from ..settings import InputError, ranged


@dataclass
class TagSettings(TextSettings):
    """Settings for tagged words and their windows."""

    examples: Literal["columns", "case"] = "columns"  # case: derived from the text column, see `case_tags`
    words_column: str = "words"
    tags_column: str = "tags"
    # tokens that a window of a long document shares with the previous one
    overlap: int = ranged(128, least=0, why="0 makes windows without overlap")


@dataclass
class Tagged:
    """A document. Words with the tag None are part of the input, but neither trained on nor scored."""

    words: list[str]
    tags: list[str | None]


def load_tagged(settings: TagSettings) -> dict[str, list[Tagged]]:
    """Load all three splits, and check that all tags occur in the training data."""
    if settings.examples == "case":
        return load_splits(settings, lambda row: case_tags(text_of(row, settings)))
    splits = load_splits(settings, lambda row: _tagged(row, settings), label_column=settings.tags_column)
    known = set(tag_names(splits["train"]))
    for name, documents in splits.items():
        if unseen := sorted(set(tag_names(documents)) - known):
            raise InputError(
                f"The {name} data has tags that are missing in the training data: {', '.join(unseen)}. "
                "Remove these documents or add some to the training data."
            )
    return splits


def tag_names(documents: list[Tagged]) -> list[str]:
    return sorted(tag_counts(documents))


def tag_counts(documents: list[Tagged]) -> Counter[str]:
    return Counter(tag for document in documents for tag in document.tags if tag is not None)


def _tagged(row: Row, settings: TagSettings) -> Tagged:
    place, _ = row
    words, tags = value_of(row, "words_column", settings), value_of(row, "tags_column", settings)
    for name, values, kinds in (
        (settings.words_column, words, (str,)),
        (settings.tags_column, tags, (str, int, type(None))),
    ):
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            raise InputError(
                f"The column {name!r} must be a list with one entry for each word, but {place} has {values!r}."
            )
    if len(words) != len(tags):
        raise InputError(
            f"There must be one tag for each word, but {place} has {len(words)} words and {len(tags)} tags."
        )
    return Tagged(words, [None if tag is None else str(tag) for tag in tags])


def case_tags(text: str) -> Tagged:
    """Case restoration: words in lower case without punctuation at their ends, and tags for what was removed.

    `START` is the first word of a sentence, `B-NAME` and `I-NAME` the first and the other words of a run of capitalised
    words within a sentence, which ends at punctuation. All other words are `O`, including the pronoun I.
    """
    words, tags = [], []
    starts, in_name = True, False
    for raw in text.split():
        word = re.sub(r"^\W+|\W+$", "", raw)
        if word:
            is_name = word[0].isupper() and not re.fullmatch(r"I(['\u2019]\w+)?", word)
            tags.append("START" if starts else ("I-NAME" if in_name else "B-NAME") if is_name else "O")
            words.append(word.lower())
            in_name = is_name and not starts
            starts = False
        starts = starts or ends_sentence(raw)
        in_name = in_name and raw.endswith(word)
    return Tagged(words, tags)


def tag_windows(
    documents: list[Tagged],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: TagSettings,
    model: PreTrainedModel,
) -> Features:
    """Windows with a label at the first token of every word; their notes are the indices of their documents,
    and their shared data are the names of the classes.

    The windows of a long document share `overlap` tokens. A word in the overlap is labelled in the window that shows
    more of its context, so that every word is trained on and scored once.
    """
    check_offsets(tokenizer, "Tags")
    texts = [" ".join(document.words) for document in documents]
    head, tail = special_frame(tokenizer, texts)
    room = max_length - len(head) - len(tail)
    if room <= settings.overlap:
        raise InputError(
            f"overlap ({settings.overlap}) must be less than the tokens of text in a window ({room}): reduce overlap "
            "or increase max_length."
        )
    ids_of_tags = {None: IGNORED, **(model.config.label2id or {})}
    rows, notes, coverage = [], [], Coverage()
    for index, (document, (ids, encoding)) in enumerate(zip(documents, encoded(tokenizer, texts), strict=True)):
        assert encoding is not None
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        first = first_tokens(document.words, np.array(encoding.offsets).reshape(-1, 2))
        labels[list(first)] = [ids_of_tags[document.tags[word]] for word in first.values()]
        shown = 0
        for part, own in overlapping_slices(len(ids), room, settings.overlap):
            window = np.full(len(ids[part]), IGNORED, dtype=np.int32)
            window[own.start - part.start : own.stop - part.start] = labels[own]
            if (window != IGNORED).any():  # a mean over no labels would be NaN
                framed = np.pad(window, (len(head), len(tail)), constant_values=IGNORED)
                rows.append({"input_ids": np.concatenate([head, ids[part], tail]), "labels": framed})
                notes.append(index)
                shown += own.stop - own.start
        coverage.add(len(ids), shown)
    return Features(rows, notes, list((model.config.id2label or {}).values()), coverage)


def first_tokens(words: list[str], offsets: np.ndarray) -> dict[int, int]:
    """The first token of each word, as token → word, in the words joined by spaces.

    A token belongs to the word of its last character: byte-level tokens begin with the space before the word.
    """
    ends = np.cumsum([len(word) + 1 for word in words])  # of each word, including the space after it
    of_token = np.searchsorted(ends, offsets[:, 1] - 1, side="right")
    first: dict[int, int] = {}
    seen = -1
    for token, word in enumerate(of_token.tolist()):
        if word > seen and offsets[token, 1] > offsets[token, 0]:
            first[token], seen = word, word
    return first


class TagScorer(Scorer):
    """Loss, accuracy and the F1 of entities, at one token of each word; an entity may span two windows."""

    names = ("f1", "precision", "recall", "accuracy")

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[float, list[int], list[int]]]:
        found = []
        for logits, labels in zip(outputs.logits.float(), batch["labels"], strict=True):
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            loss = cross_entropy(logits, labels, reduction="sum").item()
            found.append((loss, logits.argmax(-1).tolist(), labels.tolist()))
        return found

    def scores(self, found: list[tuple[float, list[int], list[int]]]) -> dict[str, float]:
        losses, predictions, references = zip(*found, strict=True)
        # the windows of a document are in order, and each of its words is labelled in one of them
        documents: dict[int, tuple[list[int], list[int]]] = {}
        for index, ours, theirs in zip(self.data.notes, predictions, references, strict=True):
            whole = documents.setdefault(index, ([], []))
            whole[0].extend(ours)
            whole[1].extend(theirs)
        tags = [
            [[self.data.shared[tag] for tag in row] for row in rows] for rows in zip(*documents.values(), strict=True)
        ]
        entities = compute_metrics([EntityF1(keep_in_memory=True)], *tags)
        return {"loss": sum(losses) / sum(map(len, references)), **entities}


class TagTask(Task[TagSettings]):
    name = "tag_tokens"
    settings_class = TagSettings
    auto_class = AutoModelForTokenClassification
    task_type = "token-classification"
    unit = "windows"
    collate = DataCollatorForTokenClassification
    scorer = TagScorer
    purpose = "A tagger, which predicts a class for every word."

    def load(self, settings: TagSettings) -> Source:
        return Source.of_texts(settings, load_tagged, tag_windows, tag_counts)

    def limits(self, settings: TagSettings) -> list[str]:
        case = settings.examples == "case"
        made = "It restores the case of text in lower case without punctuation at the ends of words: START "
        made += "is the first word of a sentence, NAME a run of capitalised words."
        return [
            "The first token of a word has its tag; predictions at its other tokens are meaningless.",
            *([made] if case else ["It predicts only the tags in its training data."]),
        ]


TASK = TagTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
