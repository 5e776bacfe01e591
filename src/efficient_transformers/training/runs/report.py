"""Write tables and pictures of finished runs into docs/results.md, between marks.

python training/report.py [FOLDER …] [--out docs/results.md] [--only GROUP …] [--picture GROUP=docs/GROUP.png …]
    [--beside SETTING]

Reads every `metrics.json` below the folders (default: runs). The runs of one YAML file in configs form a table, and
runs that differ only in their seed form a row. A table is written between `<!-- begin:GROUP -->` and `<!-- end:GROUP
-->`, where the next call replaces it; a group without marks is appended. All other text is kept. With `--beside
max_length`, runs that differ in that setting are shown side by side in one row, in groups that have such runs.

The runs of the tables are stored next to the page, in docs/results.json, and are read from there too, so that tables
can be extended or rewritten when the folders are gone. A run below the folders replaces the stored one with the same
settings and seed. Each stored run is one line, which can be deleted. The choice of side-by-side settings is stored as
well;
`--beside none` gives each run its own row again.
"""

import argparse
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..engine.outputs import CHECKPOINTS, METRICS, write_whole
from ..settings import FREE_TO_CHANGE, InputError, Settings
from ..tasks import task_of
from .errors import add_debug, input_errors

RUNS = Path("runs")
LOWER_IS_BETTER = {"loss", "perplexity", "nats_per_byte", "bits_per_byte"}
MEMORY = "peak memory, MB"
MOST_COMMANDS = 4  # more are replaced by one train_all.py command in the text around the table
SHOWN_BY_ANOTHER = {"perplexity"}  # exp(loss)
NOT_OF_A_ROW = FREE_TO_CHANGE | {"seed", "config"}
NEEDED = {"test", "training", "model", "settings"}
# the rest, mainly the training history, is long and not shown in tables
KEPT = ("test", "validation", "training", "model", "peak_memory_mb", "command", "settings", "versions")
# an absolute path, or one from a home folder, at the start of a text, a word or a value
ABSOLUTE = re.compile(r"""(?<![^\s=:'"\[{(,])(?:~\w*)?/[\w.][^\s'"\]}),]*""")
OF_A_CHECKOUT = {"configs", "model_cards", "runs", "training"}


@dataclass
class Row:
    """Runs that differ only in their seed."""

    name: str
    settings: dict[str, Any]
    runs: list[dict[str, Any]]

    def values(self, column: str) -> pd.Series:
        """Values of a column such as `training.steps` for the runs that have it."""
        table = pd.json_normalize(self.runs)
        return pd.Series(table.get(column, []), dtype=float).dropna()

    def scores(self, name: str) -> pd.Series:
        return self.values(f"test.{name}")

    def mean(self, name: str) -> float:
        return float(self.scores(name).mean())

    @property
    def seeds(self) -> str:
        return ", ".join(str(seed_of(run)) for run in self.runs)

    @property
    def parameters(self) -> str:
        return f"{self.runs[0]['model']['parameters']:,}"

    @property
    def speed(self) -> str:
        """Tokens per second, mean over the runs."""
        return f"{self.values('training.tokens_per_second').mean():,.0f}"

    @property
    def memory(self) -> str:
        """Largest peak memory of the runs, in MB; empty if it was not measured."""
        peaks = pd.concat([self.values("training.peak_memory_mb"), self.values("peak_memory_mb")])
        return f"{peaks.max():,.0f}" if len(peaks) else ""


@dataclass
class Kept:
    """Contents of the file next to the page."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)  # group → the setting whose values are shown side by side

    @classmethod
    def read(cls, path: Path) -> "Kept":
        if not path.exists():
            return cls()
        try:
            kept = cls(**json.loads(path.read_text(encoding="utf-8")))
            complete = isinstance(kept.beside, dict) and all(run.keys() >= NEEDED for run in kept.runs)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as stored runs: {error}") from error
        if not complete:
            raise InputError(f"{path} cannot be read as stored runs: each must have {', '.join(sorted(NEEDED))}.")
        return kept

    def write(self, path: Path) -> None:
        """Write one run per line, so that a diff shows which runs were added and removed."""
        runs = ",".join(f"\n  {json.dumps(run, ensure_ascii=False)}" for run in self.runs)
        beside = json.dumps(dict(sorted(self.beside.items())), ensure_ascii=False)
        write_whole(path, f'{{\n "beside": {beside},\n "runs": [{runs}\n ]\n}}\n')


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read all finished runs below the folders, each of them once, the newest last."""
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}: name folders that contain runs with a {METRICS}.")
        for path in folder.rglob(METRICS):
            if CHECKPOINTS not in path.parts:
                paths.setdefault(path.resolve(), path)
    runs = []
    for path in sorted(paths.values(), key=lambda path: (path.stat().st_mtime_ns, path)):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            missing = NEEDED - run.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as the metrics of a run: {error}") from error
        if missing:
            raise InputError(f"{path} is not the metrics of a run: it lacks {', '.join(sorted(missing))}.")
        runs.append(kept_of(run))
    if not runs:
        raise InputError(f"No finished run (no {METRICS}) is below {', '.join(map(str, folders))}.")
    return runs


def kept_of(run: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run that tables need, without local paths."""
    kept = {key: without_machine(run[key]) for key in KEPT if key in run}
    kept["model"].pop("costs", None)
    settings = {key: value for key, value in kept["settings"].items() if key not in FREE_TO_CHANGE - {"config", "task"}}
    if config := run["settings"].get("config"):
        settings["config"] = "/".join(config.removesuffix(".yaml").split("/")[-2:])
    return kept | {"settings": settings}


def without_machine(value: Any) -> Any:
    """Shorten absolute paths in `value` to the part inside the checkout, and others to their last part."""
    if isinstance(value, dict):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine(item) for item in value]
    return ABSOLUTE.sub(inner_path, value) if isinstance(value, str) else value


def inner_path(found: re.Match[str]) -> str:
    parts = found[0].rstrip("/").split("/")
    return "/".join(parts[max((at for at, part in enumerate(parts) if part in OF_A_CHECKOUT), default=-1) :])


def latest(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last one of all runs with the same settings and seed, in an order independent of their folders."""
    found = {(*group_of(run), json.dumps(settings_of(run), sort_keys=True), seed_of(run)): run for run in runs}
    return [found[key] for key in sorted(found)]


def seed_of(run: dict[str, Any]) -> int:
    return run["settings"].get("seed", 0)


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    """Settings that distinguish rows; a setting newer than the run has its default value."""
    try:
        settings_class = task_of(run["settings"]).settings_class
    except InputError:  # an older run of a file that is no longer in configs
        settings_class = Settings
    defaults: dict[str, Any] = {}
    for setting in fields(settings_class):
        if setting.default_factory is not MISSING:
            defaults[setting.name] = setting.default_factory()
        elif setting.default is not MISSING:
            defaults[setting.name] = setting.default
    return {key: value for key, value in (defaults | run["settings"]).items() if key not in NOT_OF_A_ROW}


def group_of(run: dict[str, Any]) -> tuple[str, str]:
    """The YAML file and variant of a run; if they were not recorded, its data and model."""
    group, _, name = (run["settings"].get("config") or "").partition("/")
    return group or Path(run["settings"]["data"]).stem, name or run["model"]["model_type"].removeprefix("et_")


def rows_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """Group → rows, the best first."""
    found: dict[tuple[str, str, str], Row] = {}
    for run in runs:
        group, name = group_of(run)
        settings = settings_of(run)
        key = group, name, json.dumps(settings, sort_keys=True)
        found.setdefault(key, Row(name, settings, [])).runs.append(run)
    groups: dict[str, list[Row]] = {}
    for (group, _, _), row in found.items():
        row.runs.sort(key=seed_of)
        groups.setdefault(group, []).append(row)
    for rows in groups.values():
        best = score_names(rows)[0]
        sign = 1 if best in LOWER_IS_BETTER else -1
        rows.sort(key=lambda row: sign * row.mean(best) if len(row.scores(best)) else float("inf"))
        tell_apart(rows)
    return groups


def tell_apart(rows: Sequence[Row]) -> None:
    """Append to rows with the same name the settings in which they differ."""
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
    """Names of the test scores, the run's `best_metric` first; whole numbers are counts and are omitted.

    If a classifier's weights are selected by loss, its accuracy still comes first.
    """
    found: dict[str, None] = {}
    for row in rows:
        names = [name for name, value in row.runs[0]["test"].items() if isinstance(value, float)]
        best = row.settings.get("best_metric")
        if best == "loss" and "macro_f1" in names:
            best = "accuracy"
        found |= dict.fromkeys(sorted(names, key=lambda name: name != best))
    kept = [name for name in found if name not in SHOWN_BY_ANOTHER]
    if not kept:
        raise InputError(f"The runs {', '.join(row.name for row in rows)} have no test scores to show.")
    return kept


def spread(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation; a single value is shown as it is, and no values as an empty string."""
    series = pd.Series(list(values), dtype=float)
    if len(series) < 2:
        return "".join(f"{value:.3f}" for value in series)
    return f"{series.mean():.3f} ± {series.std():.3f}"


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table with at least one line; columns with only empty cells are omitted."""
    cells = pd.DataFrame(lines)
    cells = cells.loc[:, (cells != "").any()]
    return "".join(f"| {' | '.join(line)} |\n" for line in [cells.columns, ["---"] * cells.shape[1], *cells.to_numpy()])


def table(rows: Sequence[Row]) -> str:
    """Markdown table, followed by the commands that produce it if there are few."""
    names = score_names(rows)
    lines = [
        {
            "variant": row.name,
            **{name: spread(row.scores(name)) for name in names},
            "seeds": row.seeds,
            "parameters": row.parameters,
            "steps": f"{row.values('training.steps').mean():,.0f}",
            "tokens/s": row.speed,
            MEMORY: row.memory,
        }
        for row in rows
    ]
    text = f"{markdown(lines)}\n{under(rows)}\n"
    commands = dict.fromkeys(run["command"] for row in rows for run in row.runs if run.get("command"))
    few = 0 < len(commands) <= MOST_COMMANDS
    return text + ("\n```bash\n" + "\n".join(commands) + "\n```\n" if few else "")


def under(rows: Sequence[Row], more: str = "") -> str:
    """The line below a table."""
    counts = sorted({row.runs[0]["test"]["n"] for row in rows if "n" in row.runs[0]["test"]})
    hardware = sorted(
        {run["training"]["hardware"] for row in rows for run in row.runs if "hardware" in run["training"]}
    )
    text = f"Test scores, n = {', '.join(f'{count:,}' for count in counts)}" if counts else "Test scores"
    if any(len(row.runs) > 1 for row in rows):
        text += "; mean ± sample standard deviation over the seeds"
    return f"{text}.{more}" + (f" {'; '.join(hardware)}." if hardware else "")


def side_by_side(rows: Sequence[Row], setting: str) -> str:
    """Markdown table in which rows that differ only in `setting` share one line; the best first scores come first."""
    score = score_names(rows)[0]
    values = sorted({row.settings.get(setting) for row in rows}, key=lambda value: (value is not None, value))
    heads = dict(zip(values, columns(rows, score, setting, values), strict=True))
    found: dict[tuple[str, str], dict[Any, Row]] = {}
    for row in rows:
        rest = json.dumps({key: value for key, value in row.settings.items() if key != setting}, sort_keys=True)
        found.setdefault((group_of(row.runs[0])[1], rest), {})[row.settings.get(setting)] = row
    lefts = [
        Row(name, json.loads(rest), line[min(line, key=values.index)].runs) for (name, rest), line in found.items()
    ]
    tell_apart(lefts)
    lines = []
    for left, line in zip(lefts, found.values(), strict=True):
        seeds = [line[value].seeds if value in line else "-" for value in values]
        lines.append(
            {
                "variant": left.name,
                **{head: spread(line[value].scores(score)) if value in line else "" for value, head in heads.items()},
                "seeds": seeds[0] if len(set(seeds)) == 1 else " / ".join(seeds),
                "parameters": left.parameters,
                "tokens/s": left.speed,
                MEMORY: left.memory,
            }
        )
    notes = under(rows, " Speed and memory are those of the left score's runs.")
    return f"{markdown(lines)}\n{notes}\n"


def columns(rows: Sequence[Row], score: str, setting: str, values: Sequence[Any]) -> list[str]:
    """A column title per value of `setting`; for max_length the number of tokens, or the model's maximum if unset."""
    if setting != "max_length":
        return [score if value is None else f"{score}, {setting}={value}" for value in values]
    taken = {run["model"].get("max_length") for row in rows if row.settings.get(setting) is None for run in row.runs}
    (whole,) = taken if len(taken) == 1 else (None,)
    lengths = [whole if value is None else value for value in values]
    if None in lengths or len({*lengths}) < len(lengths):
        lengths = values
    return [f"{score}, full length" if length is None else f"{score}, {length:,} tokens" for length in lengths]


def differ(rows: Sequence[Row], setting: str) -> bool:
    return len({json.dumps(row.settings.get(setting)) for row in rows}) > 1


def marks(group: str) -> tuple[str, str]:
    return f"<!-- begin:{group} -->", f"<!-- end:{group} -->"


def put(text: str, group: str, content: str) -> str:
    """`text` with `content` between the marks of `group`, which are appended if missing."""
    begin, end = marks(group)
    counts = text.count(begin), text.count(end)
    if counts == (0, 0):
        before = text.rstrip("\n") + "\n\n" if text.strip() else ""
        return f"{before}## {group}\n\n{begin}\n{content}{end}\n"
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise InputError(
            f"The text must contain {begin} once, and {end} once after it, but has {counts[0]} and {counts[1]}: fix it."
        )
    at = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return at.sub(lambda _: f"{begin}\n{content}{end}", text)


def draw(group: str, rows: Sequence[Row], path: Path) -> None:
    """Plot the mean of the first score of each row as a dot, with a bar of one standard deviation to both sides."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    name = score_names(rows)[0]
    shown = [row for row in reversed(rows) if len(row.scores(name))]
    deviations = [float(np.nan_to_num(row.scores(name).std())) for row in shown]
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.28 * len(shown)), layout="constrained")
    axes.errorbar([row.mean(name) for row in shown], range(len(shown)), xerr=deviations, fmt="o", capsize=3)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_xlabel(f"test {name.replace('_', ' ')}" + (" (less is better)" if name in LOWER_IS_BETTER else ""))
    axes.set_title(group)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_asked(picture: str, groups: dict[str, list[Row]]) -> None:
    group, equals, path = picture.partition("=")
    if not equals or not path:
        raise InputError(f"--picture ({picture!r}) must have the form GROUP=FILE.png.")
    draw(group, chosen(groups, group), Path(path))


def chosen(groups: dict[str, list[Row]], group: str) -> list[Row]:
    if group not in groups:
        raise InputError(f"There are no runs of {group!r}; there are some of {', '.join(groups)}.")
    return groups[group]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="folders of runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups to write (default: all)")
    parser.add_argument("--picture", nargs="+", default=[], metavar="GROUP=FILE.png", help="plot a group as well")
    parser.add_argument("--beside", metavar="SETTING", help="show runs that differ in it side by side; none: do not")
    add_debug(parser)
    given = parser.parse_args(arguments)
    with input_errors(debug=given.debug):
        written, runs = write_page(given)
    print(f"{given.out}: {', '.join(written)}; {given.out.with_suffix('.json')}: {runs} runs")


def write_page(given: argparse.Namespace) -> tuple[list[str], int]:
    """Write the page, the stored runs and the pictures; return the groups written and the number of runs."""
    file = given.out.with_suffix(".json")
    if file == given.out:
        raise InputError(
            f"--out ({given.out}) must be a page such as {given.out.with_suffix('.md')}: {file} stores its runs."
        )
    kept = Kept.read(file)
    folders = given.folders or ([RUNS] if not kept.runs or any(RUNS.rglob(METRICS)) else [])
    found = read_runs(folders) if folders else []
    groups = rows_of(latest([*kept.runs, *found]))
    written = {group: chosen(groups, group) for group in given.only or groups}
    kept.beside = settings_beside(kept, groups, written, given.beside)
    text = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
    for group, rows in written.items():
        setting = kept.beside.get(group)
        content = side_by_side(rows, setting) if setting and differ(rows, setting) else table(rows)
        text = put(text, group, content)
    for picture in given.picture:
        draw_asked(picture, groups)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept.runs = latest([*kept.runs, *(run for run in found if group_of(run)[0] in written)])
    kept.write(file)  # before the page, which can be recreated from it
    write_whole(given.out, text)
    return list(written), len(kept.runs)


def settings_beside(
    kept: Kept, groups: Collection[str], written: dict[str, list[Row]], asked: str | None
) -> dict[str, str]:
    """Group → the setting to show side by side: as stored, except for the groups that `--beside` changes."""
    beside = {group: setting for group, setting in kept.beside.items() if group in groups}
    if asked is None:
        return beside
    if asked == "none":
        return {group: setting for group, setting in beside.items() if group not in written}
    about = [group for group, rows in written.items() if differ(rows, asked)]
    if not about:
        raise InputError(f"No runs of {', '.join(written)} differ in {asked!r}, the setting of --beside.")
    return beside | dict.fromkeys(about, asked)
