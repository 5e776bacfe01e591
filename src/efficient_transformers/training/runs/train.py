"""Train a model, evaluate it on the test split and save it, with its card, ready for the Hub.

    accelerate launch training/train.py --config configs/era.yaml --variant local [--learning_rate 1e-3 …] [--resume]

The YAML names the task; every setting of it is an option, and `--model.hidden_size 256` sets a field of the model.
An interrupted run goes on with `--resume`. Exit codes: 2 if something given cannot be used, 143 if SIGTERM has stopped
the run. Code that a checkpoint, a tokenizer or a metric brings along runs only with `--trust_remote_code`: a YAML file
cannot allow it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from accelerate import PartialState

from ..engine.loop import Stopped
from ..settings import compose
from ..tasks import read_settings, task_of
from .errors import input_errors


def main(arguments: list[str] | None = None) -> None:
    given, options = parse(arguments)
    variant = [] if given.variant is None else ["--variant", given.variant]
    command = shlex.join(
        ["accelerate", "launch", "training/train.py", "--config", str(given.config), *variant, *options]
    )
    with input_errors():
        if given.help:
            print(task_of(compose(given.config, given.variant)).settings_class.parser().format_help())
            return
        task, settings = read_settings(given.config, given.variant, options)
        try:
            task.run(settings, command)
        except Stopped:
            again = command if settings.resume else f"{command} --resume"
            PartialState().print(f"Stopped by SIGTERM and saved. To continue: {again}", flush=True)
            sys.exit(143)  # what a shell reports for SIGTERM: a scheduler must not take the run for finished


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options that say what the settings are, and those of the settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of settings, e.g. configs/era.yaml")
    parser.add_argument("--variant", help="its section of the YAML, and its file in configs/variants")
    parser.add_argument("-h", "--help", action="store_true", help="with --config: shows the settings of its task")
    given, options = parser.parse_known_args(arguments)
    if given.config is None:
        if given.help:
            parser.print_help()
            parser.exit()
        parser.error("--config is required")
    return given, options
