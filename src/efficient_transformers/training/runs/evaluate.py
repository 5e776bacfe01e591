"""Evaluate a finished run, or a folder of model_cards, on the test split of its data.

    python training/evaluate.py runs/era-local [--max_length 512 …]

Every setting of the run's task is an option, which takes the place of the recorded value.
"""

import argparse
import sys
from pathlib import Path

from ..engine.outputs import recorded_settings
from ..settings import InputError
from ..tasks import task_of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the run; before the other options")
    given, options = parser.parse_known_args(arguments)
    try:
        task_of(recorded_settings(given.folder)).evaluate_folder(given.folder, options)
    except InputError as error:
        sys.exit(f"error: {error}")
