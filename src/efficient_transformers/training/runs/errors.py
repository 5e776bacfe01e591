"""Exit codes and messages of the scripts for invalid input."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..settings import InputError

BAD_INPUT = 2  # exit code, as in argparse


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


@contextmanager
def input_errors(*others: type[Exception], debug: bool = False) -> Iterator[None]:
    """End the process with exit code 2 and one line on stderr after an InputError, or one of the `others`."""
    try:
        yield
    except (InputError, *others) as error:
        if debug:
            raise
        message = f"error: {' '.join(str(error).split())}"
        print(message, file=sys.stderr, flush=True)
        ended = SystemExit(message)  # for callers in Python; an interpreter exits with the code
        ended.code = BAD_INPUT
        raise ended from error
