"""Count how much of the documents is used: parts that are cut or skipped, and empty documents."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Coverage:
    """Number of documents in a split, and how much of them no example contains. Only tokens of text are counted."""

    documents: int = 0
    empty: int = 0  # documents without a token of text, which are omitted
    cut: int = 0  # documents that are not used completely
    tokens: int = 0
    unseen: int = 0  # tokens that are in no example

    def add(self, tokens: int, seen: int) -> None:
        """Count a document with `tokens` tokens, `seen` of which are used."""
        self.documents += 1
        self.empty += not tokens
        self.cut += seen < tokens
        self.tokens += tokens
        self.unseen += tokens - seen

    @property
    def whole(self) -> bool:
        return not (self.empty or self.unseen)

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.documents:,} documents, {self.tokens:,} tokens"]
        if self.unseen:
            share = 100 * self.unseen / self.tokens
            parts.append(f"{self.cut:,} documents are cut, {self.unseen:,} tokens ({share:.3g} %) are not shown")
        if self.empty:
            parts.append(f"{self.empty:,} documents are empty and left out")
        return "; ".join(parts if not self.whole else [*parts, "all are shown"])


def coverage_of(data: Any) -> Coverage | None:
    """The coverage of an encoded split; None if it is streamed or does not consist of documents."""
    return getattr(data, "coverage", None)


def coverage_lines(recorded: Mapping[str, Mapping[str, int]], incomplete_only: bool = False) -> list[str]:
    """One line per split, from the entry `data` of `metrics.json`."""
    found = {name: Coverage(**counts) for name, counts in recorded.items()}
    return [f"{name}: {coverage}" for name, coverage in found.items() if not (incomplete_only and coverage.whole)]


def recorded(splits: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The coverage of all splits that have one, for `metrics.json`."""
    found: Iterable[tuple[str, Coverage | None]] = ((name, coverage_of(split)) for name, split in splits.items())
    return {name: coverage.to_dict() for name, coverage in found if coverage is not None}
