"""One config over several seeds and lengths, and a table of the means: does the length pay?

    python training/seeds.py --config configs/era.yaml --variant local --max-lengths 4096 512 --seeds 0 1 2

Finished runs are not repeated and interrupted ones are continued, so the same command can be given again.
Each length is trained for itself; `evaluate.py FOLDER --max_length 512` cuts the input of a trained model.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from ..engine.outputs import write_whole
from ..settings import InputError
from .report import spread
from .running import RunFailed, train_or_find


def table(runs: dict[int, dict[int, dict[str, Any]]]) -> str:
    """Markdown: a row a length, from length → seed → metrics."""
    lines = [
        "| tokens seen | test accuracy | macro F1 | accuracy per seed | test windows | training time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for length, by_seed in runs.items():
        tests = [run["test"] for run in by_seed.values()]
        accuracies = [test["accuracy"] for test in tests]
        seconds = statistics.mean(run["training"]["seconds"] for run in by_seed.values())
        lines.append(
            f"| {length:,} | {spread(accuracies)} | {spread([test['macro_f1'] for test in tests])} "
            f"| {', '.join(f'{accuracy:.3f}' for accuracy in accuracies)} | {tests[0]['n']} | {seconds:,.0f} s |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-lengths", type=int, nargs="+", default=[4096, 512])
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/<config>-seeds)")
    parser.add_argument("--accelerate-config", type=Path, help="passed to `accelerate launch` as --config_file")
    given, options = parser.parse_known_args(arguments)
    out = given.out or Path("runs", f"{given.config.stem}-{given.variant}-seeds")
    launcher = [sys.executable]
    if given.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(given.accelerate_config)]

    runs: dict[int, dict[int, dict[str, Any]]] = {length: {} for length in given.max_lengths}
    try:
        # all lengths of a seed before the next seed: a half-finished comparison then compares like with like
        for seed in given.seeds:
            for length in given.max_lengths:
                folder = out / f"length-{length}-seed-{seed}"
                more = [*options, f"--seed={seed}", f"--max_length={length}", f"--out={folder}"]
                runs[length][seed] = train_or_find(given.config, given.variant, more, launcher)
    except InputError as error:
        sys.exit(f"error: {error}")
    except RunFailed as failed:
        sys.exit(str(failed))
    text = f"{given.config}, {len(given.seeds)} seeds, mean ± standard deviation\n\n{table(runs)}\n"
    write_whole(out / "table.md", text)
    print(text)
