"""What messages about wrong input have in common: the nearest valid name, and the cause of an error in one line."""

from collections.abc import Iterable
from difflib import get_close_matches

from huggingface_hub.errors import StrictDataclassError

MANY_NAMES, LONG = 40, 400  # names that are listed, and characters of an error of another library that are kept


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'hidden_size'?`, or the names that there are."""
    names = list(known)
    if close := get_close_matches(name, names, n=1, cutoff=0.6):
        return f"; did you mean {close[0]!r}?"
    rest = f" and {len(names) - MANY_NAMES} more" if len(names) > MANY_NAMES else ""
    return f"; known are {', '.join(names[:MANY_NAMES])}{rest}"


def check_fields(names: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise ValueError for a name that is no field of `owner`, which transformers would keep silently."""
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{owner} has no field {name!r}{did_you_mean(name, known)}")


def said(error: BaseException) -> str:
    """The message of an error in one line, without the lines that a strict dataclass puts around a check, and cut."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONG else f"{text[:LONG]} …"
