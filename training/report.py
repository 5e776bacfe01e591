"""Tables, and pictures, of finished runs, written into docs/results.md between the marks of their own.

python training/report.py [FOLDER …] [--out docs/results.md] [--only GROUP …] [--picture GROUP=docs/GROUP.png …]
    [--beside SETTING]

Every `metrics.json` below the folders (default: runs) is read. Runs of one folder of configs make a table, runs that
differ in their seed alone a row. A table stands between `<!-- begin:GROUP -->` and `<!-- end:GROUP -->`, where the next
call replaces it; a group without marks is put at the end. All other text stays as it is. With `--beside
self_pretrain_steps` runs that differ in that setting stand side by side in one line.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outputs import CHECKPOINTS, FREE_TO_CHANGE, METRICS, write_whole
from settings import InputError

LOWER_IS_BETTER = {"loss", "perplexity", "nats_per_byte", "bits_per_byte"}
SHOWN_BY_ANOTHER = {"perplexity"}  # exp(loss)
NOT_OF_A_ROW = FREE_TO_CHANGE | {"seed", "config"}


@dataclass
class Row:
    """Runs that differ in their seed alone."""

    name: str
    settings: dict[str, Any]
    runs: list[dict[str, Any]]

    def scores(self, name: str) -> list[float]:
        return [run["test"][name] for run in self.runs if name in run["test"]]

    def mean(self, name: str) -> float:
        return statistics.mean(self.scores(name))


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The metrics of all finished runs below the folders, each once, in the order of their paths."""
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}: name folders of runs, which have a {METRICS} below them.")
        for path in folder.rglob(METRICS):
            if CHECKPOINTS not in path.parts:
                paths.setdefault(path.resolve(), path)
    runs = []
    for path in sorted(paths.values()):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            missing = {"test", "training", "model", "settings"} - run.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as the metrics of a run: {error}") from error
        if missing:
            raise InputError(f"{path} is not the metrics of a run: it lacks {', '.join(sorted(missing))}.")
        runs.append(run)
    if not runs:
        raise InputError(f"No finished run (no {METRICS}) is below {', '.join(map(str, folders))}.")
    return runs


def group_of(run: dict[str, Any]) -> tuple[str, str]:
    """Folder and name of the run's YAML; of a run that does not tell them, its data and the model."""
    folder, _, name = (run["settings"].get("config") or "").rpartition("/")
    return folder or Path(run["settings"]["data"]).stem, name or run["model"]["model_type"].removeprefix("et_")


def rows_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Group → rows, the best first."""
    found: dict[tuple[str, str, str], Row] = {}
    for run in runs:
        group, name = group_of(run)
        settings = {key: value for key, value in run["settings"].items() if key not in NOT_OF_A_ROW}
        key = group, name, json.dumps(settings, sort_keys=True)
        found.setdefault(key, Row(name, settings, [])).runs.append(run)
    groups: dict[str, list[Row]] = {}
    for (group, _, _), row in found.items():
        row.runs.sort(key=lambda run: run["settings"].get("seed", 0))
        groups.setdefault(group, []).append(row)
    for rows in groups.values():
        best = score_names(rows)[0]
        sign = 1 if best in LOWER_IS_BETTER else -1
        rows.sort(key=lambda row: sign * row.mean(best) if row.scores(best) else float("inf"))
        tell_apart(rows)
    return groups


def tell_apart(rows: Sequence[Row]) -> None:
    """Rows of one name get what they differ in behind it."""
    names = [row.name for row in rows]
    for row, name in zip(rows, names, strict=True):
        others = [flat(other.settings) for other, same in zip(rows, names, strict=True) if same == name]
        mine = flat(row.settings)
        keys = sorted({key for other in others for key in other | mine if other.get(key) != mine.get(key)})
        row.name = ", ".join([name, *(f"{key}={mine.get(key)}" for key in keys)])


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    inner = {f"model.{key}": value for key, value in (settings.get("model") or {}).items()}
    return {key: value for key, value in settings.items() if key != "model"} | inner


def score_names(rows: Sequence[Row]) -> list[str]:
    """Names of the test scores, the one that the runs were told to look at first; whole numbers are counts."""
    found: dict[str, None] = {}
    for row in rows:
        best = row.settings.get("best_metric")
        names = [name for name, value in row.runs[0]["test"].items() if isinstance(value, float)]
        found |= dict.fromkeys(sorted(names, key=lambda name: name != best))
    kept = [name for name in found if name not in SHOWN_BY_ANOTHER]
    if not kept:
        raise InputError(f"The runs {', '.join(row.name for row in rows)} have no test scores to show.")
    return kept


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def peak_memory(run: dict[str, Any]) -> float | None:
    return run["training"].get("peak_memory_mb", run.get("peak_memory_mb"))


def table(rows: Sequence[Row]) -> str:
    """Markdown, and the commands that give it."""
    names = score_names(rows)
    counts = sorted({row.runs[0]["test"]["n"] for row in rows if "n" in row.runs[0]["test"]})
    has_memory = any(peak_memory(run) is not None for row in rows for run in row.runs)
    heads = [
        "variant",
        *names,
        "seeds",
        "parameters",
        "steps",
        "tokens/s",
        *(["peak memory, MB"] if has_memory else []),
    ]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for row in rows:
        first, trainings = row.runs[0], [run["training"] for run in row.runs]
        cells = [row.name]
        cells += [spread(row.scores(name)) if row.scores(name) else "" for name in names]
        cells.append(", ".join(str(run["settings"].get("seed", 0)) for run in row.runs))
        cells.append(f"{first['model']['parameters']:,}")
        cells.append(f"{round(statistics.mean(training['steps'] for training in trainings)):,}")
        cells.append(f"{round(statistics.mean(training['tokens_per_second'] for training in trainings)):,}")
        if has_memory:
            memory = [peak for run in row.runs if (peak := peak_memory(run)) is not None]
            cells.append(f"{max(memory):,.0f}" if memory else "")
        lines.append(" | ".join(cells))
    hardware = sorted(
        {run["training"]["hardware"] for row in rows for run in row.runs if "hardware" in run["training"]}
    )
    under = f"Test scores, n = {', '.join(f'{count:,}' for count in counts)}" if counts else "Test scores"
    if any(len(row.runs) > 1 for row in rows):
        under += "; mean ± sample standard deviation over the seeds"
    under += f". {'; '.join(hardware)}." if hardware else "."
    text = "\n".join(f"| {line} |" for line in lines) + f"\n\n{under}\n"
    commands = dict.fromkeys(run["command"] for row in rows for run in row.runs if run.get("command"))
    return text + ("\n```bash\n" + "\n".join(commands) + "\n```\n" if commands else "")


def side_by_side(rows: Sequence[Row], setting: str) -> str:
    """Markdown: the first score of rows that differ in `setting` alone in one line, the best of any of them first."""
    score = score_names(rows)[0]
    values = list(dict.fromkeys(sorted((row.settings.get(setting) for row in rows), key=lambda x: (x is not None, x))))
    lines: dict[str, dict[Any, Row]] = {}
    for row in rows:
        rest = json.dumps({key: value for key, value in row.settings.items() if key != setting}, sort_keys=True)
        lines.setdefault(rest, {})[row.settings.get(setting)] = row
    heads = ["variant", *(score if value is None else f"{score}, {setting}={value}" for value in values)]
    heads += ["parameters", "tokens/s", "peak memory, MB"]
    text = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for line in lines.values():
        first = line[min(line, key=values.index)]
        cells = [first.name.removesuffix(f", {setting}={first.settings.get(setting)}")]
        cells += [spread(line[value].scores(score)) if value in line else "" for value in values]
        cells.append(f"{first.runs[0]['model']['parameters']:,}")
        cells.append(f"{statistics.mean(run['training']['tokens_per_second'] for run in first.runs):,.0f}")
        memory = [peak for run in first.runs if (peak := peak_memory(run)) is not None]
        cells.append(f"{max(memory):,.0f}" if memory else "")
        text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text) + "\n\nSpeed and memory are those of the left score's runs.\n"


def marks(group: str) -> tuple[str, str]:
    return f"<!-- begin:{group} -->", f"<!-- end:{group} -->"


def put(text: str, group: str, content: str) -> str:
    """`text` with `content` between the marks of `group`, which come at the end if it has none."""
    begin, end = marks(group)
    counts = text.count(begin), text.count(end)
    if counts == (0, 0):
        before = text.rstrip("\n") + "\n\n" if text.strip() else ""
        return f"{before}## {group}\n\n{begin}\n{content}{end}\n"
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise InputError(
            f"The text must have {begin} once and {end} once behind it, and has {counts[0]} and {counts[1]}: mend it."
        )
    at = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return at.sub(lambda _: f"{begin}\n{content}{end}", text)


def draw(group: str, rows: Sequence[Row], path: Path) -> None:
    """A dot for each row at the mean of its first score, and a line of the standard deviation to both sides."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    name = score_names(rows)[0]
    shown = [row for row in reversed(rows) if row.scores(name)]
    deviations = [statistics.stdev(row.scores(name)) if len(row.scores(name)) > 1 else 0.0 for row in shown]
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.28 * len(shown)), layout="constrained")
    axes.errorbar([row.mean(name) for row in shown], range(len(shown)), xerr=deviations, fmt="o", capsize=3)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_xlabel(f"test {name.replace('_', ' ')}" + (" (less is better)" if name in LOWER_IS_BETTER else ""))
    axes.set_title(group)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def chosen(groups: dict[str, list[Row]], group: str) -> list[Row]:
    if group not in groups:
        raise InputError(f"There are no runs of {group!r}; there are some of {', '.join(groups)}.")
    return groups[group]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups to write (default: all)")
    parser.add_argument("--picture", nargs="+", default=[], metavar="GROUP=FILE.png", help="draws a group as well")
    parser.add_argument("--beside", metavar="SETTING", help="runs that differ in it stand side by side")
    given = parser.parse_args(arguments)
    try:
        groups = rows_of(read_runs(given.folders))
        text = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
        for group in given.only or groups:
            rows = chosen(groups, group)
            text = put(text, group, side_by_side(rows, given.beside) if given.beside else table(rows))
        for picture in given.picture:
            group, equals, path = picture.partition("=")
            if not equals or not path:
                raise InputError(f"--picture ({picture!r}) must have the form GROUP=FILE.png.")
            draw(group, chosen(groups, group), Path(path))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.out, text)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {', '.join(given.only or groups)}")


if __name__ == "__main__":
    main()
