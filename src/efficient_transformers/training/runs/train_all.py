"""Train the variants of a task, one after another, for a table of results.

    python training/train_all.py --config configs/mqar.yaml [--variants full local …] [--seeds 0 1 2] [--out FOLDER]
        [--learning_rate 1e-3 …]

Settings are options, as in train.py. Finished runs are skipped and interrupted ones are resumed, so the command can be
repeated. A run that fails does not stop the others; failed runs are listed at the end, with exit code 1.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from ... import VARIANTS
from ..settings import InputError, compose
from ..tasks import task_of
from .errors import add_debug, input_errors
from .running import RunFailed, train_or_find

STOPPED = 143  # exit code of a run stopped by SIGTERM


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML of the task")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help="default: all that support the task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--accelerate_config", type=Path, help="passed to `accelerate launch` as --config_file")
    add_debug(parser)
    given, options = parser.parse_known_args(arguments)
    launcher = [sys.executable]
    if given.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(given.accelerate_config)]
    with input_errors(debug=given.debug):
        variants = given.variants or variants_of(given.config)

    failed = []
    # all variants of a seed before the next seed, so that an incomplete table compares the same seeds
    for seed in given.seeds:
        for variant in variants:
            folder = given.out / f"{given.config.stem}-{variant}{f'-seed-{seed}' if seed else ''}"
            try:
                metrics = train_or_find(
                    given.config, variant, [*options, "--seed", str(seed), "--out", str(folder)], launcher
                )
            except (InputError, RunFailed) as error:
                if isinstance(error, RunFailed) and (error.code == STOPPED or error.code < 0):
                    sys.exit(str(error))  # a request to stop ends all runs
                failed.append(f"{given.config}, {variant}: {error}")
                print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics["test"].items())
            print(f"{given.config}, {variant}, seed {seed}: {scores} ({folder})", flush=True)
    if failed:
        sys.exit("\n".join(["error: these runs failed:", *failed]))


def variants_of(config: Path) -> list[str]:
    """The variants that support a task: causal language modelling needs a causal variant."""
    causal = task_of(compose(config, next(iter(VARIANTS)))).auto_class is AutoModelForCausalLM
    return [name for name, variant in VARIANTS.items() if variant.causal or not causal]
