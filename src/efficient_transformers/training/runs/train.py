"""Train a model, evaluate it on the test split and save it, with its card, for the Hub.

    accelerate launch training/train.py --config configs/era.yaml --variant local [--learning_rate 1e-3 …] [--resume]

The YAML names the task. Every setting of the task is an option, and `--model.hidden_size 256` sets a field of the
model.
`--resume` resumes an interrupted run. Exit codes: 2 for invalid input, 143 if SIGTERM stopped the run. Code that comes
with a checkpoint, a tokenizer or a metric runs only with `--trust_remote_code`: a YAML file cannot allow it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from accelerate import PartialState

from ..engine.loop import Stopped
from ..settings import compose
from ..tasks import read_settings, task_of
from .errors import add_debug, input_errors


def main(arguments: list[str] | None = None) -> None:
    given, options = parse(arguments)
    variant = [] if given.variant is None else ["--variant", given.variant]
    command = shlex.join(
        ["accelerate", "launch", "training/train.py", "--config", str(given.config), *variant, *options]
    )
    with input_errors(debug=given.debug):
        if given.help:
            print(task_of(compose(given.config, given.variant)).settings_class.parser().format_help())
            return
        task, settings = read_settings(given.config, given.variant, options)
        try:
            task.run(settings, command)
        except Stopped:
            again = command if settings.resume else f"{command} --resume"
            PartialState().print(f"Stopped by SIGTERM; the state is saved. To resume: {again}", flush=True)
            sys.exit(143)  # as a shell reports SIGTERM: a scheduler must not consider the run finished


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into options that select the settings, and options that change them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of settings, e.g. configs/era.yaml")
    parser.add_argument("--variant", help="selects its section of the YAML, and its file in configs/variants")
    parser.add_argument("-h", "--help", action="store_true", help="with --config: show the settings of its task")
    add_debug(parser)
    given, options = parser.parse_known_args(arguments)
    if given.config is None:
        if given.help:
            parser.print_help()
            parser.exit()
        parser.error("--config is required")
    return given, options
