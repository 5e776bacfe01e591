"""Labelled documents, and the token windows that a classifier reads."""

import re
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..settings import InputError
from .texts import SPLITS, Row, TextSettings, load_splits, text_of, value_of
from .token_cache import cache_file, cached_map


@dataclass
class DocumentSettings(TextSettings):
    """How labelled documents are read and cut."""

    label_column: str = "label"
    mask_digits: bool = False  # every digit becomes 0, so that a number cannot give the label away
    window_length: int | None = None  # tokens of a window, special tokens included; default: one example a document
    shortest_window: int = 512  # a shorter rest of a document is dropped, unless it is the only window

    def check(self) -> None:
        super().check()
        if self.window_length is not None and self.window_length < 8:
            raise InputError(f"window_length ({self.window_length}) must be at least 8 tokens.")
        if self.window_length and self.max_length and self.max_length > self.window_length:
            raise InputError(
                f"max_length ({self.max_length}) must not exceed window_length ({self.window_length}): "
                "a window has no more tokens to see."
            )


@dataclass
class Documents:
    """Texts and the names of their labels, one split each."""

    splits: dict[str, tuple[list[str], list[str]]]

    @property
    def labels(self) -> list[str]:
        """The training labels' names: in numeric order where all are whole numbers, else in alphabetic order."""
        names = set(self.splits["train"][1])
        try:
            return sorted(names, key=int)
        except ValueError:
            return sorted(names)


def load_documents(settings: DocumentSettings) -> Documents:
    """All three splits, checked: texts with labels that the training data has, too."""
    pairs = load_splits(
        settings,
        lambda row: (text_of(row, settings), _label_of(row, settings)),
        label=lambda pair: pair[1],
        label_column=settings.label_column,
    )
    splits = {name: ([text for text, _ in split], [label for _, label in split]) for name, split in pairs.items()}
    known = set(splits["train"][1])
    if len(known) < 2:
        raise InputError(f"The training data has only the label {known.pop()!r}: a classifier needs at least two.")
    for name in SPLITS[1:]:
        unseen = sorted(set(splits[name][1]) - known)
        if unseen:
            raise InputError(
                f"The {name} data has labels that the training data lacks: {', '.join(unseen)}. "
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
) -> datasets.Dataset:
    """Windows of a split, with `input_ids` and `labels`, on the disk if they are cached and else in memory."""
    ids = {name: i for i, name in enumerate(documents.labels)}
    how = {
        "kind": "documents",
        "labels": documents.labels,
        "max_length": max_length,
        **{name: getattr(settings, name) for name in ("mask_digits", "window_length", "shortest_window")},
    }

    def windows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [re.sub(r"\d", "0", text) if settings.mask_digits else text for text in batch["text"]]
        kept, sources = cut_windows(texts, tokenizer, max_length, settings.window_length, settings.shortest_window)
        return {"input_ids": kept, "labels": [ids[batch["label"][source]] for source in sources]}

    texts, labels = documents.splits[split]
    table = datasets.Dataset.from_dict({"text": texts, "label": labels})
    file = cache_file(tokenizer, texts, how | {"of": labels}) if settings.cache_tokens else None
    workers = min(settings.num_workers, len(table)) if settings.num_workers else None
    return cached_map(table, windows, file, batch_size=64, num_proc=workers, desc=f"tokenising {split}")


def cut_windows(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    window_length: int | None = None,
    shortest_window: int = 1,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every window and the index of its text.

    Windows have `window_length` tokens with the special ones, and do not overlap. Of each the first `max_length` are
    kept, so that runs with different `max_length` see the same windows; the special tokens at the end stay.
    Without `window_length` a text is one window.
    """
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=window_length or max_length,
        return_overflowing_tokens=window_length is not None,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    sources = encoded["overflow_to_sample_mapping"] if window_length is not None else list(range(len(texts)))
    windows, kept_sources = [], []
    previous = None
    for tokens, special, source in zip(encoded["input_ids"], encoded["special_tokens_mask"], sources, strict=True):
        first, previous = source != previous, source
        if window_length is not None and not first and len(tokens) < shortest_window:
            continue
        if len(tokens) > max_length:
            tail = special[::-1].index(0) if 0 in special else 0
            tokens = tokens[: max_length - tail] + tokens[len(tokens) - tail :]
        windows.append(tokens)
        kept_sources.append(source)
    return windows, kept_sources
