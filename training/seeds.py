"""One config over several seeds and lengths, and a table of the means: does the length pay?

    python training/seeds.py --config configs/era/local.yaml --max-lengths 4096 512 --seeds 0 1 2 [key=value …]

Finished runs are not repeated and interrupted ones are continued, so the same command can be given again.
Each length is trained for itself; `classify.py --evaluate FOLDER max_length=512` cuts the input of a trained model.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from classify import ClassifySettings
from outputs import METRICS, differences, write_whole
from report import spread
from settings import InputError, Settings

CLASSIFY = Path(__file__).with_name("classify.py")


class RunFailed(Exception):
    """A run has ended with another code than 0."""

    def __init__(self, folder: Path, code: int):
        super().__init__(f"The run in {folder} ended with code {code}; the same command continues it.")
        self.code = code


def train_or_find(
    config: Path,
    overrides: list[str],
    launcher: list[str],
    script: Path = CLASSIFY,
    settings_class: type[Settings] = ClassifySettings,
) -> dict[str, Any]:
    """The metrics of one run, which is trained unless it is there."""
    settings = settings_class.from_yaml(config, overrides)
    finished = settings.folder / METRICS
    if not finished.exists():
        command = [*launcher, str(script), "--config", str(config), *overrides, "resume=true"]
        code = subprocess.run(command).returncode
        if code:
            raise RunFailed(settings.folder, code)
    elif different := differences(settings.folder, settings):
        raise InputError(
            f"{settings.folder} holds a run with other settings ({'; '.join(different)}): set --out to another folder."
        )
    return json.loads(finished.read_text(encoding="utf-8"))


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-lengths", type=int, nargs="+", default=[4096, 512])
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/<config>-seeds)")
    parser.add_argument("--accelerate-config", type=Path, help="passed to `accelerate launch` as --config_file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    out = given.out or Path("runs", f"{given.config.parent.name}-{given.config.stem}-seeds")
    launcher = [sys.executable]
    if given.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(given.accelerate_config)]

    runs: dict[int, dict[int, dict[str, Any]]] = {length: {} for length in given.max_lengths}
    try:
        # all lengths of a seed before the next seed: a half-finished comparison then compares like with like
        for seed in given.seeds:
            for length in given.max_lengths:
                folder = out / f"length-{length}-seed-{seed}"
                overrides = [*given.overrides, f"seed={seed}", f"max_length={length}", f"out={folder}"]
                runs[length][seed] = train_or_find(given.config, overrides, launcher)
    except InputError as error:
        sys.exit(f"error: {error}")
    except RunFailed as failed:
        sys.exit(str(failed))
    text = f"{given.config}, {len(given.seeds)} seeds, mean ± standard deviation\n\n{table(runs)}\n"
    write_whole(out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
