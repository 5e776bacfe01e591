"""Cut documents into windows of token ids for training without labels."""

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
IGNORED = -100  # label of a token that is not predicted


@dataclass
class Window:
    """`ids` begin and end with the tokenizer's special tokens; tokens of one word have the same number in `words`."""

    ids: np.ndarray
    words: np.ndarray


class Packer:
    """Cuts texts into windows of up to `max_length` tokens, including the tokenizer's special tokens.

    `documents` joins the documents of a split with separators and cuts the stream: every window except the last one is
    full, and no token is lost (FULL-SENTENCES of Liu et al. 2019, arXiv:1907.11692, section 4.2, but without regard to
    sentences). Tokens also attend to the other documents in their window.
    `padding` cuts every document separately; windows shorter than `max_length` are padded in the batch. A remainder of
    fewer than `shortest_window` tokens, including special ones, is dropped unless it is the whole document.
    `best_fit` cuts like `padding`, but drops nothing, for `Rows`.
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
                "The tokenizer has neither a separator nor an end token to place between documents: "
                "set packing to best_fit or padding, or set the tokenizer's sep_token."
            )
        if whole_words:
            check_words(tokenizer)

    def __call__(self, texts: list[str]) -> list[Window]:
        """Return the windows of the texts, and set `coverage` to the part of the texts that they contain."""
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
            # special tokens that occur in the text itself
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
    """Coverage of a split, from the number of texts and the `sizes` of the documents that are not empty.

    `whole` and `shown` are token counts before and after cutting, for each document or for all of them joined.
    """
    missing = [max(0, all_of_it - seen) for all_of_it, seen in zip(whole, shown, strict=True)]
    return Coverage(texts, texts - len(sizes), sum(map(bool, missing)), sum(sizes), sum(missing))


class Windows(Dataset):
    """The windows of a split as a dataset; subclasses define a model's inputs and the number of predictions."""

    coverage: Coverage | None = None  # of the texts that were cut

    def __init__(self, windows: Sequence[Any]):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each window."""
        return [len(window.ids) for window in self.windows]

    def counts(self) -> dict[str, int]:
        """Number of predictions, by their names in `metrics.json`."""
        raise NotImplementedError


class Rows(Windows):
    """Rows of up to `max_length` tokens that contain several windows; `position_ids` restart at 0 in each window.

    A model that separates them computes the same outputs as for each window alone. Their first tokens are not predicted
    if the windows exclude them. `windows` may be any dataset of inputs with known `lengths`.
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
    """Rows of at most `room` tokens: the longest window first, each in the row with the least sufficient room.

    Ding et al. 2024 (arXiv:2404.10830), section 2: best-fit decreasing. Windows longer than a row were cut before.
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
    """Return the windows, or with `best_fit` rows of them."""
    return Rows(windows, windows.lengths, max_length) if packing == "best_fit" else windows


@dataclass
class RowCollator:
    """Pads the `position_ids` of rows that have them, and passes everything else to `collate`."""

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
    """Yield the token ids of each text without added special tokens, and the Encoding of a fast tokenizer."""
    shown = len(texts) > at_once and sys.stderr.isatty()
    for start in trange(0, len(texts), at_once, desc="tokenising", unit_scale=at_once, disable=not shown):
        batch = tokenizer(
            texts[start : start + at_once],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about documents longer than the model's input
        )
        for row, ids in enumerate(batch["input_ids"]):
            yield np.array(ids, dtype=np.int32), batch.encodings[row] if batch.encodings else None


def slices(length: int, room: int, shortest: int) -> Iterator[slice]:
    """Cut `length` tokens after every `room`; a remainder shorter than `shortest` is dropped, unless it is all."""
    for start in range(0, length, room):
        if not start or length - start >= min(room, shortest):
            yield slice(start, start + room)


def overlapping_slices(length: int, room: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """Windows of `room` tokens, each sharing `overlap` with the previous one, and the part that each of them owns.

    The owned parts divide the tokens among the windows: the shared tokens of two windows are split in half.
    """
    begin = 0
    for start in range(0, max(length - overlap, 1), room - overlap):
        stop = min(start + room, length)
        end = length if stop == length else stop - overlap // 2
        yield slice(start, stop), slice(begin, end)
        begin = end


def special_frame(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the tokenizer adds before and after a text, determined from one of the texts."""
    for text in texts:
        encoded = tokenizer(text[:99], return_special_tokens_mask=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        of_text = np.flatnonzero(np.equal(encoded["special_tokens_mask"], 0))
        if len(of_text):
            return ids[: of_text[0]], ids[of_text[-1] + 1 :]
    return np.array([], dtype=np.int32), np.array([], dtype=np.int32)


def check_offsets(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise InputError unless the tokenizer is from the tokenizers library, which provides character offsets."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{what} need a tokenizer with character offsets, but {type(tokenizer).__name__} is not from the "
            "tokenizers library (a fast one): use another tokenizer."
        )


def shortened(
    text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, keep: Literal["start", "end"] = "start"
) -> tuple[str, int]:
    """The text, truncated to its first or last `tokens` tokens, and its full number of tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= tokens:
        return text, len(offsets)
    return text[: offsets[tokens - 1][1]] if keep == "start" else text[offsets[-tokens][0] :], len(offsets)


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer splits texts into words before it cuts them into tokens, with any marker (`Ġ`, `##`)."""
    if not tokenizer.is_fast:
        raise InputError(
            f"whole_word needs a tokenizer with word boundaries, but {type(tokenizer).__name__} is not from the "
            "tokenizers library (a fast one): set whole_word to false or use another tokenizer."
        )
    words = tokenizer("one two", add_special_tokens=False).word_ids()
    if len(set(words)) < 2:
        raise InputError(
            "whole_word needs a tokenizer with word boundaries, but this one treats 'one two' as a single word: "
            "set whole_word to false or use another tokenizer."
        )
