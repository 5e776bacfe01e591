"""Sentences and excerpts of running text, from which tasks are made that need no labels of anybody's."""

import re

# one letter, and titles: a full stop behind them ends no sentence
ABBREVIATION = re.compile(r"\W*([A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Hon|Gen|Col|Capt|Lieut|Sen|Rep|Gov|St|No|Nos|vs|etc)\.")
SENTENCE_END = re.compile(r"[.?!][\"')\]\u201d\u2019]*$")


def ends_sentence(word: str) -> bool:
    """Does a sentence end with `word`, its punctuation included?"""
    return bool(SENTENCE_END.search(word)) and not ABBREVIATION.fullmatch(word)


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space between words made one blank."""
    found, current = [], []
    for word in text.split():
        current.append(word)
        if ends_sentence(word):
            found.append(" ".join(current))
            current = []
    return [*found, " ".join(current)] if current else found


def excerpts(text: str, words: int) -> list[str]:
    """The text in pieces of whole sentences, each of at least `words` words; a shorter rest is dropped."""
    found, current = [], []
    for sentence in sentences(text):
        current += sentence.split()
        if len(current) >= words:
            found.append(" ".join(current))
            current = []
    return found
