"""Cuts documents into windows of token ids for training without labels."""

import sys
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Encoding
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import trange
from transformers import PreTrainedTokenizerBase

from ..settings import InputError
from .coverage import Coverage, coverage_of

Packing = Literal["documents", "padding", "best_fit"]
NO_WORD = -1  # the word of a special token
IGNORED = -100  # label of a token that is not to be predicted


@dataclass
class Window:
    """`ids` begin and end as the tokenizer's texts do; tokens of one word have the same number in `words`."""

    ids: np.ndarray
    words: np.ndarray


class Packer:
    """Cuts texts into windows of up to `max_length` tokens, the tokenizer's special ones included.

    `documents` joins the documents of a split, a separator between two of them, and cuts the stream: every window is
    full but the split's last one, and no token is lost (FULL-SENTENCES of Liu et al. 2019, arXiv:1907.11692,
    section 4.2, without regard to sentences). A token sees the documents beside its own.
    `padding` cuts every document for itself; what is short of `max_length` is padded in the batch. A rest of fewer
    than `shortest_window` tokens, special ones included, is dropped, unless it is all there is of a document.
    `best_fit` cuts as `padding` and drops nothing, for `Rows`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        packing: Packing = "documents",
        shortest_window: int = 1,
        whole_words: bool = False,
    ):
        self.tokenizer, self.max_length, self.packing = tokenizer, max_length, packing
        self.shortest_window, self.whole_words = shortest_window, whole_words
        added = tokenizer.num_special_tokens_to_add()
        if max_length <= added:
            raise InputError(
                f"max_length ({max_length}) leaves no room for text beside the special tokens that the tokenizer adds "
                f"({added}): raise it."
            )
        self.separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if packing == "documents" and self.separator is None:
            raise InputError(
                "The tokenizer has neither a separator nor an end token to stand between documents: "
                "set packing to best_fit or padding, or give the tokenizer a sep_token."
            )
        if whole_words:
            check_words(tokenizer)

    def __call__(self, texts: list[str]) -> list[Window]:
        """The windows of the texts; `coverage` then says how much of these they show."""
        documents = [document for document in self.tokenised(texts) if len(document.ids)]
        sizes = [len(document.ids) for document in documents]
        if self.packing == "documents" and documents:
            documents = [self.joined(documents)]
        head, tail = special_frame(self.tokenizer, texts)
        windows = [list(self.cut(document, head, tail)) for document in documents]
        added = len(head) + len(tail)
        shown = [sum(len(window.ids) - added for window in own) for own in windows]
        self.coverage = packed_coverage(len(texts), sizes, [len(document.ids) for document in documents], shown)
        return [window for own in windows for window in own]

    def tokenised(self, texts: list[str]) -> Iterator[Window]:
        for ids, encoding in encoded(self.tokenizer, texts):
            words = np.arange(len(ids), dtype=np.int32)
            if self.whole_words:
                assert encoding is not None
                words[:] = [NO_WORD if word is None else word for word in encoding.word_ids]
            # special tokens that stand in the text itself
            words[np.isin(ids, self.tokenizer.all_special_ids)] = NO_WORD
            yield Window(ids, words)

    def joined(self, documents: list[Window]) -> Window:
        ids, words, first_word = [], [], 0
        for document in documents:
            numbered = np.where(document.words == NO_WORD, NO_WORD, document.words + first_word)
            first_word = max(first_word, int(numbered.max()) + 1)
            ids += [[self.separator], document.ids]
            words += [[NO_WORD], numbered]
        return Window(*(np.concatenate(parts[1:], dtype=np.int32) for parts in (ids, words)))

    def cut(self, document: Window, head: np.ndarray, tail: np.ndarray) -> Iterator[Window]:
        added = len(head) + len(tail)
        shortest = self.shortest_window - added if self.packing == "padding" else 1
        for part in slices(len(document.ids), self.max_length - added, shortest):
            ids, words = document.ids[part], document.words[part]
            if (words != NO_WORD).any():
                yield Window(
                    np.concatenate([head, ids, tail]),
                    np.pad(words, (len(head), len(tail)), constant_values=NO_WORD),
                )


def packed_coverage(texts: int, sizes: Sequence[int], whole: Sequence[int], shown: Sequence[int]) -> Coverage:
    """Of a split's texts, whose documents have these `sizes` without those that are empty.

    `whole` and `shown` are the tokens of what is cut, one document each or all joined, and of its windows.
    """
    missing = [max(0, all_of_it - seen) for all_of_it, seen in zip(whole, shown, strict=True)]
    return Coverage(texts, texts - len(sizes), sum(map(bool, missing)), sum(sizes), sum(missing))


class Windows(Dataset):
    """The windows of a split as a data set; a subclass says what a model gets of each, and what there is to predict."""

    coverage: Coverage | None = None  # of the texts that were cut

    def __init__(self, windows: Sequence[Any]):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(window.ids) for window in self.windows]

    def counts(self) -> dict[str, int]:
        """What is predicted, by the names of `metrics.json`."""
        raise NotImplementedError


class Rows(Windows):
    """Windows, several in a row of up to `max_length` tokens, whose `position_ids` start again at 0 in each.

    A model that keeps them apart makes of each what it makes of it alone; their first tokens are predicted by nothing
    if the windows have it so. `windows` may be any data set of inputs whose `lengths` are given.
    """

    def __init__(self, windows: Any, lengths: list[int], max_length: int):
        super().__init__(windows)
        self.coverage = coverage_of(windows)
        self.window_lengths, self.rows = lengths, best_fit(lengths, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.rows[index]
        windows = [self.windows[window] for window in row]
        inputs = {name: np.concatenate([window[name] for window in windows]) for name in windows[0]}
        return {**inputs, "position_ids": np.concatenate([np.arange(self.window_lengths[window]) for window in row])}

    def set_epoch(self, *epoch: int) -> None:
        if hasattr(self.windows, "set_epoch"):
            self.windows.set_epoch(*epoch)  # type: ignore[attr-defined]

    @property
    def lengths(self) -> list[int]:
        return [sum(self.window_lengths[window] for window in row) for row in self.rows]

    def counts(self) -> dict[str, int]:
        return self.windows.counts()  # type: ignore[attr-defined]


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens: the longest window first, each where it leaves the least room.

    Ding et al. 2024 (arXiv:2404.10830), section 2: best-fit decreasing. What is longer than a row has been cut before.
    """
    rows: list[list[int]] = []
    unfilled: list[tuple[int, int]] = []  # free tokens of a row and its number, sorted
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        at = bisect_left(unfilled, (lengths[window], 0))
        free, row = unfilled.pop(at) if at < len(unfilled) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(window)
        if free > lengths[window]:
            insort(unfilled, (free - lengths[window], row))
    return rows


def packed(windows: Windows, max_length: int, packing: Packing) -> Windows:
    """The windows, or with `best_fit` rows of them."""
    return Rows(windows, windows.lengths, max_length) if packing == "best_fit" else windows


@dataclass
class RowCollator:
    """Pads the `position_ids` of rows that have them, and leaves all else to `collate`."""

    collate: Any
    padding_side: str

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        positions = [torch.as_tensor(row["position_ids"]) for row in rows if "position_ids" in row]
        batch = self.collate([{name: row[name] for name in row if name != "position_ids"} for row in rows])
        if positions:
            batch["position_ids"] = pad_sequence(positions, batch_first=True, padding_side=self.padding_side)
        return batch


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], at_once: int = 64
) -> Iterator[tuple[np.ndarray, Encoding | None]]:
    """Token ids of each text without those that the tokenizer would add, and what a fast one knows of them besides."""
    shown = len(texts) > at_once and sys.stderr.isatty()
    for start in trange(0, len(texts), at_once, desc="tokenising", unit_scale=at_once, disable=not shown):
        batch = tokenizer(
            texts[start : start + at_once],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that a document is longer than the model is no news here
        )
        for row, ids in enumerate(batch["input_ids"]):
            yield np.array(ids, dtype=np.int32), batch.encodings[row] if batch.encodings else None


def slices(length: int, room: int, shortest: int) -> Iterator[slice]:
    """Cuts `length` tokens after every `room`; a rest of less than `shortest` is left out, unless it is the whole."""
    for start in range(0, length, room):
        if not start or length - start >= min(room, shortest):
            yield slice(start, start + room)


def overlapping_slices(length: int, room: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """Windows of `room` tokens, each sharing `overlap` with the one before it, and the part of each that is its own.

    The own parts divide the tokens among the windows: two windows share what they both show half and half.
    """
    begin = 0
    for start in range(0, max(length - overlap, 1), room - overlap):
        stop = min(start + room, length)
        end = length if stop == length else stop - overlap // 2
        yield slice(start, stop), slice(begin, end)
        begin = end


def special_frame(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the tokenizer puts before and after a text; told by one of these, which it surely knows."""
    for text in texts:
        encoded = tokenizer(text[:99], return_special_tokens_mask=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        of_text = np.flatnonzero(np.equal(encoded["special_tokens_mask"], 0))
        if len(of_text):
            return ids[: of_text[0]], ids[of_text[-1] + 1 :]
    return np.array([], dtype=np.int32), np.array([], dtype=np.int32)


def check_offsets(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Only the tokenizers library tells which characters a token stands for."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{what} need a tokenizer that knows where in the text its tokens stand, and {type(tokenizer).__name__} is "
            "not one of the tokenizers library (a fast one): take another tokenizer."
        )


def shortened(
    text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, keep: Literal["start", "end"] = "start"
) -> tuple[str, int]:
    """The text, or of a longer one what its first or its last `tokens` tokens stand for; and how many it has."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= tokens:
        return text, len(offsets)
    return text[: offsets[tokens - 1][1]] if keep == "start" else text[offsets[-tokens][0] :], len(offsets)


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Words are the tokenizer's own, found before it cuts them into tokens: whatever marks them, `Ġ` or `##`."""
    if not tokenizer.is_fast:
        raise InputError(
            f"whole_word needs a tokenizer that knows its words, and {type(tokenizer).__name__} is not one of the "
            "tokenizers library (a fast one): set whole_word to false or take another tokenizer."
        )
    words = tokenizer("one two", add_special_tokens=False).word_ids()
    if len(set(words)) < 2:
        raise InputError(
            "whole_word needs a tokenizer that knows its words, and this one takes 'one two' for a single word: "
            "set whole_word to false or take another tokenizer."
        )
