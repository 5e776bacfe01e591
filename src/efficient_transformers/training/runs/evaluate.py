"""Evaluate a finished run, or a folder of model_cards, on the test split of its data.

    python training/evaluate.py runs/era-local [--max_length 512 …]

Every setting of the run's task is an option, which overrides the recorded value. Code that comes with the folder, for
its model, tokenizer or metrics, runs only with `--trust_remote_code`, even if the run was trained with it.
"""

import argparse
from pathlib import Path

from ..engine.outputs import recorded_settings
from ..tasks import task_of
from .errors import add_debug, input_errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run; before the other options")
    add_debug(parser)
    given, options = parser.parse_known_args(arguments)
    with input_errors(debug=given.debug):
        task_of(recorded_settings(given.folder)).evaluate_folder(given.folder, options)
