"""Examples that are generated instead of read: each depends only on the seed, its split and its index."""

import hashlib
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..data.coverage import Coverage
from ..data.texts import SPLITS
from ..settings import InputError

LOG = logging.getLogger(__name__)
SPECIAL = ("[PAD]", "[CLS]", "[UNK]", "[MASK]")  # the first ids of every generated vocabulary, followed by the words

Seed = tuple[int, int, int]  # seed of the data, index of the split, index of the example


class Generator(Protocol):
    """A task: its vocabulary, the names of its answers, and an example for every seed.

    An example has the indices of its words (n,), and the index of its answer, or (n,) of them with -100 at positions
    without a label.
    """

    @property
    def words(self) -> Sequence[str]: ...

    @property
    def answers(self) -> Sequence[str]: ...

    def __call__(self, seed: Seed) -> tuple[np.ndarray, Any]: ...


@dataclass(frozen=True)
class OneOf:
    """Examples from one of several generators, selected at random. The last one has the words of all."""

    generators: tuple[Generator, ...]

    @property
    def words(self) -> Sequence[str]:
        return self.generators[-1].words

    @property
    def answers(self) -> Sequence[str]:
        return self.generators[-1].answers

    def __call__(self, seed: Seed) -> tuple[np.ndarray, Any]:
        # a separate stream, because the generator itself draws from that of the seed
        drawn = np.random.default_rng((*seed, 1)).integers(len(self.generators))
        return self.generators[drawn](seed)


class Examples(Dataset):
    """Token ids and labels in memory; examples are truncated to their first `max_length` tokens."""

    def __init__(self, ids: Sequence[np.ndarray], labels: Sequence[Any], max_length: int | None = None):
        self.ids, self.labels, self.max_length = ids, labels, max_length

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index][: self.max_length], "labels": self.labels[index]}

    @property
    def lengths(self) -> list[int]:
        return [min(len(ids), self.max_length or len(ids)) for ids in self.ids]

    @property
    def coverage(self) -> Coverage:
        found = Coverage()
        for ids, shown in zip(self.ids, self.lengths, strict=True):
            found.add(len(ids), shown)
        return found


def generate(generator: Generator, split: str, size: int, seed: int, cache: str | None = None) -> Examples:
    """`size` examples of a split; with a `cache`, they are read from that folder or written to it for later runs."""
    kept = Path(cache, f"{split}-{_fingerprint(generator, size, seed)}.npz") if cache else None
    if kept is not None and kept.exists():
        try:
            with np.load(kept) as arrays:
                return Examples(np.split(arrays["ids"], arrays["ends"][:-1]), arrays["labels"].tolist())
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            LOG.warning(f"{kept} is corrupt ({error}): the examples are generated again.")
    examples = [generator((seed, SPLITS.index(split), index)) for index in range(size)]
    ids, labels = [ids for ids, _ in examples], [label for _, label in examples]
    if kept is not None:
        _write(kept, ids, labels)
    return Examples(ids, labels)


def _fingerprint(generator: Generator, size: int, seed: int) -> str:
    """Hash of everything that the examples depend on, including the generator's code and fields."""
    code = inspect.getsource(inspect.getmodule(type(generator)) or type(generator))
    return hashlib.sha256(f"{code}{generator!r}{size} {seed}".encode()).hexdigest()[:16]


def _write(path: Path, ids: list[np.ndarray], labels: list[int]) -> None:
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, ids=np.concatenate(ids), ends=np.cumsum([len(x) for x in ids]), labels=np.array(labels))
    except OSError as error:
        raise InputError(
            f"The folder {path.parent} cannot be written ({error.strerror}): set cache to another."
        ) from None
    partial.replace(path)  # atomically; the last of several processes wins


def with_special(numbers: np.ndarray, has_cls: bool) -> np.ndarray:
    """Token ids of the words with these `numbers`, as in the tokenizers below."""
    head = [SPECIAL.index("[CLS]")] if has_cls else []
    return np.concatenate([np.array(head, np.int16), numbers.astype(np.int16) + np.int16(len(SPECIAL))])


def word_tokenizer(words: Sequence[str], has_cls: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words separated by spaces; with `has_cls`, texts begin with [CLS]."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, has_cls)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes; texts begin with [CLS]."""
    characters = bytes_to_unicode()
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *(characters[byte] for byte in range(256))))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, has_cls=True)


def _finished(tokenizer: Tokenizer, has_cls: bool) -> PreTrainedTokenizerFast:
    if has_cls:
        cls = ("[CLS]", SPECIAL.index("[CLS]"))
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[cls])
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    # keep words such as 12 or ] unchanged
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
