"""Causal language modelling: documents with a beginning and an end, and the number of text bytes of each token."""

import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from ..settings import InputError
from .packing import IGNORED, Packing, Windows, encoded, packed_coverage, slices, special_frame


@dataclass
class CausalWindow:
    """`sizes` are the numbers of UTF-8 bytes of text represented by each token, 0 for special tokens."""

    ids: np.ndarray
    sizes: np.ndarray

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all tokens except the first one, which is not predicted."""
        return int(self.sizes[1:].sum())


class CausalPacker:
    """Cuts texts into windows of up to `max_length` tokens, like packing.Packer, for a causal model.

    Every document begins with the tokenizer's beginning (`[CLS]`, `<s>` or nothing) and ends with its end token. These
    occur only where a document really begins and ends, and not where a window is cut from the middle of one, so that
    the model predicts the end, and `generate` stops, at the end of a text. The tokenizer must be a fast one.
    `documents` cuts the stream of all documents of a split, `padding` each document separately; a remainder of fewer
    than `shortest_window` tokens is then dropped unless it is the whole document. `best_fit` cuts like `padding` and
    drops only remainders of one token, for packing.Rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        packing: Packing = "documents",
        shortest_window: int = 1,
    ):
        if max_length < 2:
            raise InputError(
                f"max_length ({max_length}) leaves nothing to predict: a window's first token is given. Increase it."
            )
        self.tokenizer, self.max_length, self.packing = tokenizer, max_length, packing
        self.shortest_window = max(2, shortest_window) if packing == "padding" else 2

    def __call__(self, texts: list[str]) -> list[CausalWindow]:
        """Return the windows of the texts, and set `coverage` to the part of the texts that they contain."""
        head, _ = special_frame(self.tokenizer, texts)
        end = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        documents, counts = [], []
        for text, (ids, encoding) in zip(texts, encoded(self.tokenizer, texts), strict=True):
            if len(ids):
                assert encoding is not None
                sizes = byte_sizes(text, encoding)
                sizes[np.isin(ids, self.tokenizer.all_special_ids)] = 0  # those that occur in the text itself
                framed = np.concatenate([head, ids, end]), np.pad(sizes, (len(head), len(end)))
                documents.append(CausalWindow(*framed))
                counts.append(len(ids))
        if self.packing == "documents" and documents:
            rows = ([getattr(document, row) for document in documents] for row in ("ids", "sizes"))
            documents = [CausalWindow(*map(np.concatenate, rows))]
        windows = [
            [
                CausalWindow(document.ids[part], document.sizes[part])
                for part in slices(len(document.ids), self.max_length, self.shortest_window)
            ]
            for document in documents
        ]
        # a single remaining token, which is not predicted, is an end token and not text
        whole = [len(document.ids) - 1 for document in documents]
        shown = [sum(len(window.ids) for window in own) for own in windows]
        self.coverage = packed_coverage(len(texts), counts, whole, shown)
        return [window for own in windows for window in own]


class CausalWindows(Windows):
    """Windows in which each token is predicted from the earlier ones."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = self.windows[index].ids.astype(np.int64)
        labels = ids.copy()
        labels[0] = IGNORED  # otherwise left padding would seem to predict it
        return {"input_ids": ids, "labels": labels}

    @property
    def predicted_bytes(self) -> int:
        return sum(window.predicted_bytes for window in self.windows)

    def counts(self) -> dict[str, int]:
        return {
            "predicted_tokens": sum(len(window.ids) - 1 for window in self.windows),
            "predicted_bytes": self.predicted_bytes,
        }


def byte_sizes(text: str, encoding: Encoding) -> np.ndarray:
    """Number of UTF-8 bytes of `text` represented by each token, (n,); they add up to the whole text.

    A token represents the text from the end of the previous token to its own end, before the tokenizer's normalisation:
    dropped white space counts with the next token, or with the last one at the end. Tokens that byte-level BPE or byte
    fallback cut inside a character count the bytes that they hold.
    """
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    begins = np.concatenate([[0], np.cumsum(1 + (letters > 0x7F) + (letters > 0x7FF) + (letters > 0xFFFF))])
    starts, ends = np.array(encoding.offsets).T
    reached = np.maximum.accumulate(ends)
    sizes = np.diff(begins[reached], prepend=0)

    # tokens of a run share characters, each with the previous token; the first of these tokens is not in `run`
    sharing = np.flatnonzero(starts[1:] < np.minimum(reached[:-1], ends[1:])) + 1
    tokens = encoding.tokens
    for run in np.split(sharing, np.flatnonzero(np.diff(sharing) > 1) + 1) if len(sharing) else []:
        whole = sizes[run[0] - 1 : run[-1] + 1].sum()
        # a byte is one letter of byte-level BPE's alphabet
        held = [1 if re.fullmatch("<0x[0-9A-F]{2}>", tokens[i]) else len(tokens[i]) for i in run]
        if sum(held) <= whole:  # otherwise normalisation expanded a character: its first token gets all bytes
            sizes[run[0] - 1], sizes[run] = whole - sum(held), held
    sizes[-1] += begins[-1] - begins[reached[-1]]
    return sizes
