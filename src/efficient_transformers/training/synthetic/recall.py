"""Recall tasks: a sequence shows information, and later asks for it at marked positions.

The label is at the query position, and the answer does not occur after it, so that encoders and causal models are
trained and evaluated in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.packing import IGNORED
from ..settings import InputError
from .generated import Seed, with_special

BLANK, ASK = "_", "?"


@dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927, and zoology's `multiquery_ar`).

    The sequence starts with `items` key-value pairs; later, every key occurs once more as a query for its value, with
    blanks in between. Keys and values are drawn from one half of the vocabulary each, without repetition; the gap
    before a query follows a power law with the exponent `power` - 1.
    """

    length: int = 64
    items: int = 4
    vocabulary: int = 8192
    power: float = 0.01

    def __post_init__(self):
        if self.length < 4 * self.items:
            raise InputError(
                f"max_length ({self.length}) must be at least 4 x items ({self.items}): two tokens for each pair, "
                "and two for each query."
            )
        if self.items > self.vocabulary // 2 - 1:
            raise InputError(
                f"items ({self.items}) must not exceed {self.vocabulary // 2 - 1}, the keys in a vocabulary of "
                f"{self.vocabulary}: raise vocabulary."
            )

    @property
    def words(self) -> list[str]:
        return [BLANK, *(f"k{i}" for i in range(1, self.vocabulary // 2)), *self.answers]

    @property
    def answers(self) -> list[str]:
        return [f"v{i}" for i in range(self.vocabulary - self.vocabulary // 2)]

    @cached_property
    def gaps(self) -> np.ndarray:
        """Probability of each position of a query, (length / 2 - items,)."""
        weights = np.arange(1, self.length // 2 - self.items + 1) ** (self.power - 1)
        return weights / weights.sum()

    def __call__(self, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
        draw, half, shown = np.random.default_rng(seed), self.vocabulary // 2, 2 * self.items
        keys = 1 + draw.choice(half - 1, self.items, replace=False)
        values = draw.choice(self.vocabulary - half, self.items, replace=False)
        places = shown + 2 * draw.choice(len(self.gaps), self.items, replace=False, p=self.gaps)
        words, labels = np.zeros(self.length, np.int64), np.full(self.length, IGNORED)
        words[:shown:2], words[1:shown:2] = keys, half + values
        words[places], labels[places] = keys, values
        return with_special(words, has_cls=False), labels


@dataclass(frozen=True)
class Copy:
    """The copying memory task (Arjovsky et al. 2016, arXiv:1511.06464, section 4.1; Hochreiter & Schmidhuber 1997).

    `items` symbols, blanks, a mark, and as many blanks as symbols, at which the symbols must be predicted in order.
    """

    length: int = 64
    items: int = 10
    vocabulary: int = 10

    def __post_init__(self):
        if self.length < 2 * self.items + 1:
            raise InputError(
                f"max_length ({self.length}) must be more than 2 x items ({self.items}): the symbols, a mark, and a "
                "position to ask for each symbol."
            )

    @property
    def words(self) -> list[str]:
        return [BLANK, ASK, *self.answers]

    @property
    def answers(self) -> list[str]:
        return [f"s{i}" for i in range(self.vocabulary - 2)]

    def __call__(self, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
        symbols = np.random.default_rng(seed).integers(self.vocabulary - 2, size=self.items)
        words, labels = np.zeros(self.length, np.int64), np.full(self.length, IGNORED)
        words[: self.items], words[-self.items - 1] = 2 + symbols, 1
        labels[-self.items :] = symbols
        return with_special(words, has_cls=False), labels


@dataclass(frozen=True)
class Induction:
    """The induction head task (Fu et al. 2022, arXiv:2212.14052, section 3.1).

    Random symbols with a mark at a random position, and the mark again at the end, where the symbol after the first
    mark must be predicted.
    """

    length: int = 30
    vocabulary: int = 20

    def __post_init__(self):
        if self.length < 3:
            raise InputError(f"max_length ({self.length}) must be at least 3: the mark, a symbol and the mark again.")

    @property
    def words(self) -> list[str]:
        return [ASK, *self.answers]

    @property
    def answers(self) -> list[str]:
        return [f"s{i}" for i in range(self.vocabulary - 1)]

    def __call__(self, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng(seed)
        words, labels = draw.integers(1, self.vocabulary, size=self.length), np.full(self.length, IGNORED)
        mark = draw.integers(self.length - 2)
        words[[mark, -1]] = 0
        labels[-1] = words[mark + 1] - 1
        return with_special(words, has_cls=False), labels


PEOPLE = (
    "Aurelia", "Bartholomew", "Clementine", "Desdemona", "Evangeline", "Thaddeus", "Guinevere", "Hildegard",
    "Isadora", "Jocasta", "Leopold", "Magdalena", "Nathaniel", "Ophelia", "Persephone", "Rosalind",
)  # fmt: skip
THINGS = (
    "accordion", "binoculars", "chandelier", "dumpling", "wombat", "giraffe", "hedgehog", "igloo",
    "jigsaw", "kangaroo", "lobster", "marzipan", "saxophone", "penguin", "rhubarb", "trombone",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """Facts inserted at random depths of a real document, one of which must be recalled at the end.

    A window of a document is drawn. `items` sentences such as "The secret word of Ophelia is penguin." are inserted
    between its words, each with a different person and thing. It ends with the question "The secret word of Ophelia
    is", at whose last token the thing must be predicted. The names and things do not occur elsewhere in the bundled
    corpus.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    texts: Sequence[str] = field(repr=False)
    length: int = 1024
    items: int = 1

    words = ()
    answers = THINGS

    def __post_init__(self):
        if not 1 <= self.items <= min(len(PEOPLE), len(THINGS)):
            raise InputError(
                f"items ({self.items}) must lie between 1 and {min(len(PEOPLE), len(THINGS))}: each fact has its own "
                "person and thing."
            )
        room = self.length - self.items * max(map(len, self.facts.values())) - max(map(len, self.questions))
        if room < 1:
            raise InputError(
                f"max_length ({self.length}) leaves no room for text next to {self.items} facts and a question: "
                "increase it, or reduce items."
            )

    def ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def documents(self) -> list[np.ndarray]:
        return [self.ids(text) for text in self.texts]

    @cached_property
    def facts(self) -> dict[tuple[int, int], np.ndarray]:
        return {
            (person, thing): self.ids(f" The secret word of {PEOPLE[person]} is {THINGS[thing]}.")
            for person in range(len(PEOPLE))
            for thing in range(len(THINGS))
        }

    @cached_property
    def questions(self) -> list[np.ndarray]:
        return [self.ids(f" The secret word of {person} is") for person in PEOPLE]

    def __call__(self, seed: Seed) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng(seed)
        document = self.documents[draw.integers(len(self.documents))]
        people = draw.choice(len(PEOPLE), self.items, replace=False)
        things = draw.choice(len(THINGS), self.items, replace=False)
        question = self.questions[people[0]]
        facts = [self.facts[pair] for pair in zip(people.tolist(), things.tolist(), strict=True)]
        room = min(len(document), self.length - len(question) - sum(map(len, facts)))
        start = draw.integers(len(document) - room + 1)
        places = draw.integers(room + 1, size=self.items)
        pieces, at = [], 0
        for number in np.argsort(places, kind="stable"):
            pieces += [document[start + at : start + places[number]], facts[number]]
            at = places[number]
        ids = np.concatenate([*pieces, document[start + at : start + room], question])
        labels = np.full(len(ids), IGNORED)
        labels[-1] = things[0]
        return ids, labels
