"""Retrieval tasks on long documents that need no network: a query finds the one document that answers it.

Documents are `length` tokens of State of the Union addresses of one split (data/README.md), with what the query asks
for inserted at a random place. Every task is drawn from a seed, so that other seeds give other documents.

    passkey   a number of five digits for a name (the protocol of LongEmbed, Zhu et al. 2024, arXiv:2404.12096)
    needle    a person visits a building; the query names only its country, so that no word is shared (the idea of
              NoLiMa, Modarressi et al. 2025, arXiv:2502.05167)
    sentence  a sentence of the document
    halves    the first half of a document finds the second
    referent  two people have a role each, and one role wins a prize; the query asks who won it. The roles stand at the
              beginning and the prize at the end, so that no part of the document answers alone; half of the documents
              have the same people with their roles exchanged
    referent, near   the same sentences next to each other
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
from transformers import PreTrainedTokenizerBase

FIRST = [
    "Ada",
    "Boris",
    "Clara",
    "Dmitri",
    "Elena",
    "Felix",
    "Greta",
    "Hector",
    "Irma",
    "Jonas",
    "Karla",
    "Luis",
    "Mina",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Stefan",
    "Tilda",
    "Umar",
]
LAST = [
    "Abbott",
    "Brandt",
    "Castillo",
    "Dvorak",
    "Eriksen",
    "Fontaine",
    "Gallo",
    "Hartwig",
    "Ivanov",
    "Jansen",
    "Keller",
    "Lindqvist",
    "Moreau",
    "Novak",
    "Okafor",
    "Petrov",
    "Quist",
    "Rossi",
    "Santos",
    "Tanaka",
]
PLACES = {
    "the Eiffel Tower": "France", "the Colosseum": "Italy", "the Parthenon": "Greece", "Big Ben": "England",
    "the Great Pyramid": "Egypt", "the Taj Mahal": "India", "the Kremlin": "Russia", "Machu Picchu": "Peru",
    "the Sagrada Familia": "Spain", "the Brandenburg Gate": "Germany", "the Hagia Sophia": "Turkey",
    "Angkor Wat": "Cambodia", "Petra": "Jordan", "Mount Fuji": "Japan", "the Sydney Opera House": "Australia",
    "the Petronas Towers": "Malaysia", "the Little Mermaid": "Denmark", "the Charles Bridge": "Bohemia",
    "the Golden Pavilion of Kyoto": "Japan", "the Forbidden City": "China",
}  # fmt: skip
ROLES = ("captain", "engineer")
PRIZES = ("the silver medal", "the golden cup", "the bronze shield", "the blue ribbon", "the crystal star")


@dataclass
class Task:
    """Queries, the number of the document that each must find, and the documents."""

    name: str
    queries: list[str]
    answers: list[int]
    documents: list[str]


class Filler:
    """Running text of the addresses of a split, in pieces of a given number of tokens, each used once."""

    def __init__(self, split: str, tokenizer: PreTrainedTokenizerBase, seed: int):
        addresses = list(pandas.read_parquet(f"data/sotu/{split}.parquet")["text"])
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.random.shuffle(addresses)
        start = self.random.randrange(10_000)
        text = " ".join(addresses)
        self.sentences = re.split(r"(?<=[.!?])\s+", text[start:] + text[:start])
        self.at = 0

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def take(self, tokens: int) -> list[str]:
        """Whole sentences with `tokens` tokens at most, and hardly fewer."""
        taken, total = [], 0
        while True:
            sentence = self.sentences[self.at % len(self.sentences)]
            size = self.count(sentence)
            if size <= tokens and total + size > tokens:
                return taken
            self.at += 1
            if size <= tokens:
                taken.append(sentence)
                total += size


def names(draw: random.Random, count: int) -> list[str]:
    return [f"{first} {last}" for first, last in draw.sample([(f, s) for f in FIRST for s in LAST], count)]


def inserted(filler: Filler, length: int, facts: Sequence[str], places: Sequence[float] | None = None) -> str:
    """A document of about `length` tokens with each of `facts` at its place from 0 to 1, or at a random one."""
    sentences = filler.take(length - 2 - sum(map(filler.count, facts)))
    where = [filler.random.random() for _ in facts] if places is None else places
    index = [round(place * len(sentences)) for place in where]
    for number in sorted(range(len(facts)), key=lambda number: (index[number], number), reverse=True):
        sentences.insert(index[number], facts[number])
    return " ".join(sentences)


def passkey(filler: Filler, length: int, queries: int, candidates: int) -> Task:
    people = names(filler.random, candidates)
    keys = [filler.random.randrange(10_000, 100_000) for _ in people]
    facts = [
        f"The passkey of {who} is {key}. Remember that {key} is the passkey."
        for who, key in zip(people, keys, strict=True)
    ]
    documents = [inserted(filler, length, [fact]) for fact in facts]
    return Task(
        "passkey", [f"What is the passkey of {who}?" for who in people[:queries]], list(range(queries)), documents
    )


def needle(filler: Filler, length: int, queries: int, candidates: int) -> Task:
    """At most as many queries as there are places; the other documents have no needle."""
    places = list({country: place for place, country in PLACES.items()}.items())[:queries]
    people = names(filler.random, len(places))
    facts = [[f"Last week {who} visited {place}."] for who, (_, place) in zip(people, places, strict=True)]
    facts += [[] for _ in range(candidates - len(facts))]
    documents = [inserted(filler, length, fact) for fact in facts]
    asked = [f"Who has been to {country}?" for country, _ in places]
    return Task("needle", asked, list(range(len(asked))), documents)


def sentence(filler: Filler, length: int, queries: int, candidates: int) -> Task:
    documents = [filler.take(length - 2) for _ in range(candidates)]
    asked = []
    for sentences in documents[:queries]:
        fitting = [text for text in sentences if 8 <= len(text.split()) <= 30] or sentences
        asked.append(filler.random.choice(fitting))
    return Task("sentence", asked, list(range(queries)), [" ".join(sentences) for sentences in documents])


def halves(filler: Filler, length: int, queries: int, candidates: int) -> Task:
    documents = [filler.take(2 * length - 4) for _ in range(candidates)]
    first = [" ".join(sentences[: len(sentences) // 2]) for sentences in documents[:queries]]
    second = [" ".join(sentences[len(sentences) // 2 :]) for sentences in documents]
    return Task("halves", first, list(range(queries)), second)


def referent(filler: Filler, length: int, queries: int, candidates: int, near: bool = False) -> Task:
    people = names(filler.random, candidates - candidates % 2)
    asked, answers, documents = [], [], []
    for pair in range(candidates // 2):
        one, other = people[2 * pair : 2 * pair + 2]
        prize = filler.random.choice(PRIZES)
        for roles in (ROLES, ROLES[::-1]):
            facts = [f"In what follows, {one} is called the {roles[0]} and {other} the {roles[1]}."]
            facts.append(f"In the end the {ROLES[0]} won {prize}.")
            places = [0.5, 0.5] if near else [0.0, 1.0]
            documents.append(inserted(filler, length, facts, places))
            asked.append(f"{one if roles[0] == ROLES[0] else other} won {prize}.")
            answers.append(len(documents) - 1)
    chosen = sorted(filler.random.sample(range(len(asked)), min(queries, len(asked))))
    name = "referent, near" if near else "referent"
    return Task(name, [asked[i] for i in chosen], [answers[i] for i in chosen], documents)


def referent_near(*arguments: Any) -> Task:
    return referent(*arguments, near=True)


TASKS: dict[str, Callable[[Filler, int, int, int], Task]] = {
    "passkey": passkey, "needle": needle, "sentence": sentence, "halves": halves, "referent": referent,
    "referent, near": referent_near,
}  # fmt: skip
