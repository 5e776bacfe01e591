"""Classes of labelled data that look like slips: reported, or refused, before training."""

from collections.abc import Mapping

from ..settings import InputError

MANY = 0.5  # classes for each example: with more, the column is hardly one of classes
FEW = 20  # examples of which many may have a class of their own


def check_classes(counts: Mapping[str, int], what: str) -> None:
    """Raise InputError if nearly every one of the examples has a class of its own; `what` names the column."""
    examples = sum(counts.values())
    if examples >= FEW and len(counts) > MANY * examples:
        raise InputError(
            f"{what} has {len(counts):,} classes in {examples:,} training examples, too many to learn: name the column "
            "of the classes, or merge them."
        )


def class_notes(counts: Mapping[str, int]) -> list[str]:
    """A line for classes with one training example, and one for those that differ by case or blanks alone."""
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
