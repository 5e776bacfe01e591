"""Sentences and excerpts of running text, from which tasks without labels are derived."""

import re

# single letters and titles: a full stop after them does not end a sentence
ABBREVIATION = re.compile(r"\W*([A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Hon|Gen|Col|Capt|Lieut|Sen|Rep|Gov|St|No|Nos|vs|etc)\.")
SENTENCE_END = re.compile(r"[.?!][\"')\]\u201d\u2019]*$")


def ends_sentence(word: str) -> bool:
    """True if `word`, including its punctuation, ends a sentence."""
    return bool(SENTENCE_END.search(word)) and not ABBREVIATION.fullmatch(word)


def sentences(text: str) -> list[str]:
    """The sentences of a text, with white space between words replaced by single spaces."""
    found, current = [], []
    for word in text.split():
        current.append(word)
        if ends_sentence(word):
            found.append(" ".join(current))
            current = []
    return [*found, " ".join(current)] if current else found


def excerpts(text: str, words: int) -> list[str]:
    """Split a text into pieces of whole sentences with at least `words` words each; a shorter remainder is dropped."""
    found, current = [], []
    for sentence in sentences(text):
        current += sentence.split()
        if len(current) >= words:
            found.append(" ".join(current))
            current = []
    return found
