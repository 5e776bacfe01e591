"""Detect probable mistakes in the classes of labelled data before training, and report or refuse them."""

from collections.abc import Mapping

from ..settings import InputError

MANY = 0.5  # classes per example, above which the column probably does not contain classes
FEW = 20  # number of examples below which many may have distinct classes


def check_classes(counts: Mapping[str, int], what: str) -> None:
    """Raise InputError if most examples have distinct classes; `what` names the column."""
    examples = sum(counts.values())
    if examples >= FEW and len(counts) > MANY * examples:
        raise InputError(
            f"{what} has {len(counts):,} classes in {examples:,} training examples, too many to learn: name the column "
            "of the classes, or merge them."
        )


def class_notes(counts: Mapping[str, int]) -> list[str]:
    """Notes about classes with a single training example, and classes that differ only in case or spaces."""
    single = sorted(name for name, count in counts.items() if count == 1)
    same: dict[str, list[str]] = {}
    for name in sorted(counts):
        same.setdefault(" ".join(name.casefold().split()), []).append(name)
    alike = [names for names in same.values() if len(names) > 1]
    notes = []
    if single:
        notes.append(f"Classes with one training example: {listed(single)}. Are they slips?")
    if alike:
        pairs = [" and ".join(map(repr, names)) for names in alike]
        notes.append(f"Classes that differ by case or blanks alone: {listed(pairs)}. Are they the same?")
    return notes


def listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
