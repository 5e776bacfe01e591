"""Labelled documents, and the token windows on which a classifier is trained."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..settings import InputError, ranged
from .classes import check_classes
from .coverage import Coverage
from .packing import encoded, slices, special_frame
from .texts import SPLITS, Row, TextSettings, load_splits, text_of, value_of
from .token_cache import cache_file, cached_map

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        **{name: datasets.Value("int64") for name in ("labels", "document", "tokens", "seen")},
    }
)


@dataclass
class DocumentSettings(TextSettings):
    """Settings for labelled documents and their windows."""

    label_column: str = "label"
    mask_digits: bool = False  # replace every digit by 0, so that numbers do not reveal the label
    # tokens per window, including special tokens; every window is an example
    window_length: int | None = ranged(None, least=8)
    # without window_length, the treatment of documents longer than the model's input: `windows` covers all of it and
    # averages their logits in evaluation; `truncate` uses only the first tokens
    long_documents: Literal["windows", "truncate"] = "windows"
    shortest_window: int = ranged(512, least=1)  # a shorter remainder is dropped, unless it is the only window

    def check(self) -> None:
        super().check()
        if self.window_length and self.max_length and self.max_length > self.window_length:
            raise InputError(
                f"max_length ({self.max_length}) must not exceed window_length ({self.window_length}): "
                "a window has no more tokens."
            )


@dataclass
class Documents:
    """Texts and label names of each split."""

    splits: dict[str, tuple[list[str], list[str]]]

    @property
    def labels(self) -> list[str]:
        """Names of the training labels: in numeric order if all are integers, otherwise in alphabetical order."""
        names = set(self.splits["train"][1])
        try:
            return sorted(names, key=int)
        except ValueError:
            return sorted(names)


def load_documents(settings: DocumentSettings) -> Documents:
    """Load all three splits, and check that all labels occur in the training data."""
    pairs = load_splits(
        settings,
        lambda row: (text_of(row, settings), _label_of(row, settings)),
        label=lambda pair: pair[1],
        label_column=settings.label_column,
    )
    splits = {name: ([text for text, _ in split], [label for _, label in split]) for name, split in pairs.items()}
    known = set(splits["train"][1])
    check_classes(Counter(splits["train"][1]), f"The column {settings.label_column!r}")
    if len(known) < 2:
        raise InputError(f"The training data has only the label {known.pop()!r}: a classifier needs at least two.")
    for name in SPLITS[1:]:
        unseen = sorted(set(splits[name][1]) - known)
        if unseen:
            raise InputError(
                f"The {name} data has labels that are missing in the training data: {', '.join(unseen)}. "
                "Remove these documents or add some to the training data."
            )
    return Documents(splits)


def _label_of(row: Row, settings: DocumentSettings) -> str:
    place, _ = row
    label = value_of(row, "label_column", settings)
    if label is None or label == "" or isinstance(label, float | list | dict):
        raise InputError(
            f"The column {settings.label_column!r} must name a class (text or a whole number), "
            f"but {place} has {label!r}."
        )
    return str(label)


def encode_documents(
    documents: Documents, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int, settings: DocumentSettings
) -> "DocumentWindows":
    """Windows of a split, with `input_ids` and `labels`, on disk if they are cached and otherwise in memory."""
    ids = {name: i for i, name in enumerate(documents.labels)}
    how = {
        "kind": "documents",
        "labels": documents.labels,
        "max_length": max_length,
        **{name: getattr(settings, name) for name in ("mask_digits", "window_length", "shortest_window")},
        "long_documents": settings.long_documents,
    }

    def windows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = [re.sub(r"\d", "0", text) if settings.mask_digits else text for text in batch["text"]]
        cut = cut_windows(
            texts,
            tokenizer,
            max_length,
            settings.window_length,
            settings.shortest_window,
            whole=settings.long_documents == "windows",
        )
        return {
            "input_ids": cut.windows,
            "labels": [ids[batch["label"][source]] for source in cut.sources],
            "document": [indices[source] for source in cut.sources],
            "tokens": [cut.tokens[source] for source in cut.sources],
            "seen": cut.seen,
        }

    texts, labels = documents.splits[split]
    table = datasets.Dataset.from_dict({"text": texts, "label": labels})
    file = cache_file(tokenizer, texts, how | {"of": labels}) if settings.cache_tokens else None
    workers = min(settings.num_workers, len(table)) if settings.num_workers else None
    options = {"batch_size": 64, "num_proc": workers, "with_indices": True, "features": FEATURES}
    found = cached_map(table, windows, file, desc=f"tokenising {split}", **options)
    return DocumentWindows(found, len(texts))


class DocumentWindows(Dataset):
    """The windows of a split as a dataset of `input_ids` and `labels`.

    `documents` are the indices of the windows' documents, ascending.
    """

    def __init__(self, table: datasets.Dataset, documents: int):
        self.table = table.select_columns(["input_ids", "labels"])
        columns: Any = table.select_columns(["document", "tokens", "seen"]).with_format("numpy")[:]
        self.documents: list[int] = columns["document"].tolist()
        tokens, seen = np.zeros((2, documents), dtype=np.int64)
        tokens[columns["document"]] = columns["tokens"]
        np.add.at(seen, columns["document"], columns["seen"])
        self.coverage = Coverage()
        for whole, shown in zip(tokens.tolist(), seen.tolist(), strict=True):
            self.coverage.add(whole, shown)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[index]

    def column(self, name: str) -> list[Any]:
        """`input_ids` or `labels` of all windows."""
        return list(self.table[name])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each window."""
        return [len(ids) for ids in self.table["input_ids"]]


class Cut(NamedTuple):
    """Windows of texts.

    windows: token ids of each window, including special tokens.
    sources: index of each window's text, ascending.
    seen: tokens of text in each window that are not in the previous one.
    tokens: number of tokens in each text.
    """

    windows: list[list[int]]
    sources: list[int]
    seen: list[int]
    tokens: list[int]


def cut_windows(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    window_length: int | None = None,
    shortest_window: int = 1,
    *,
    whole: bool = False,
) -> Cut:
    """Cut texts into windows. Texts without tokens have no windows.

    Windows have `window_length` tokens, including special tokens, and do not overlap. The first `max_length` tokens of
    each are kept, so that runs with different `max_length` use the same windows; the special tokens at the end stay. A
    remainder of fewer than `shortest_window` tokens, including special ones, is dropped unless it is the only window.
    Without `window_length`, windows of `max_length` cover the `whole` text, and the last one is shifted back so that it
    is full; or the text is one window with its first tokens (its last ones, if the tokenizer's `truncation_side` is
    left).
    """
    head, tail = (part.tolist() for part in special_frame(tokenizer, texts))
    added = len(head) + len(tail)
    room = max_length - added
    if room < 1:
        raise InputError(
            f"max_length ({max_length}) leaves no room for text beside the special tokens that the tokenizer adds "
            f"({added}): raise it."
        )
    cut = Cut([], [], [], [])
    for source, (array, _) in enumerate(encoded(tokenizer, texts)):
        ids, count = array.tolist(), len(array)
        cut.tokens.append(count)
        if window_length is not None:
            parts = list(slices(count, window_length - added, shortest_window - added))
        elif whole:
            parts = [slice(max(0, min(start, count - room)), start + room) for start in range(0, count, room)]
        else:
            first = max(0, count - room) if tokenizer.truncation_side == "left" else 0
            parts = [slice(first, first + room)] if count else []
        shown = 0
        for part in parts:
            window = ids[part][:room]
            cut.windows.append([*head, *window, *tail])
            cut.sources.append(source)
            cut.seen.append(len(window) - max(0, shown - part.start))
            shown = part.start + len(window)
    return cut
