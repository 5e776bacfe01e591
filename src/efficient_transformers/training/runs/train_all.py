"""Several configs, one after another: the runs of a table.

    python training/train_all.py --configs configs/mqar/*.yaml [--seeds 0 1 2] [--out FOLDER] [key=value …]

Finished runs are not repeated and interrupted ones are continued, so the same command can be given again. A run that
fails does not keep the others from theirs: it is named at the end, with exit code 1.
"""

import argparse
import sys
from pathlib import Path

from ..settings import InputError
from ..tasks.scripts import SETTINGS, script_of
from .running import RunFailed, train_or_find

STOPPED = 143  # how a script ends that has heard SIGTERM


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, nargs="+", required=True, help="base.yaml among them is left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--script", choices=list(SETTINGS), help="default: by the folder of each config")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--accelerate-config", type=Path, help="passed to `accelerate launch` as --config_file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    # a shell's *.yaml and key=value cannot be told apart by argparse
    configs = [path for path in given.configs if "=" not in str(path) and path.stem != "base"]
    overrides = [*(str(path) for path in given.configs if "=" in str(path)), *given.overrides]
    launcher = [sys.executable]
    if given.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(given.accelerate_config)]

    failed = []
    # all configs of a seed before the next seed: a half-finished table then compares like with like
    for seed in given.seeds:
        for config in configs:
            folder = given.out / f"{config.resolve().parent.name}-{config.stem}{f'-seed-{seed}' if seed else ''}"
            try:
                script = script_of(config, given.script)
                metrics = train_or_find(
                    config,
                    [*overrides, f"seed={seed}", f"out={folder}"],
                    launcher,
                    script,
                )
            except (InputError, RunFailed) as error:
                if isinstance(error, RunFailed) and (error.code == STOPPED or error.code < 0):
                    sys.exit(str(error))  # a request to stop ends all runs
                failed.append(f"{config}: {error}")
                print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics["test"].items())
            print(f"{config}, seed {seed}: {scores} ({folder})", flush=True)
    if failed:
        sys.exit("\n".join(["error: these runs have failed:", *failed]))
