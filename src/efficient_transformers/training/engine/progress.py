"""Progress with the time left: a bar in a terminal, elsewhere a line every half minute."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS = 30  # between two lines where the output is no terminal


class Lines:
    """A file for tqdm that ends each state of the bar with a line feed, for logs."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if state := text.strip("\r\n "):
            self.stream.write(f"{state}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(what: str, total: int, done: int = 0, shown: bool = True, leave: bool = True) -> Any:
    """A tqdm bar of `total` steps, `done` of which are behind it; nothing unless `shown`, as on the main process.

    Where stderr is no terminal, nothing is written in the first SECONDS either.
    """
    options: dict[str, Any] = {"total": total, "initial": done, "desc": what, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**options, leave=leave)
    pace: dict[str, Any] = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return tqdm(**options, **pace, file=Lines(sys.stderr), ncols=80, leave=False, ascii=True)
