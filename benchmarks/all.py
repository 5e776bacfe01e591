"""Measure all variants, full attention and the layers of transformers against sequence length, in one command.

    python benchmarks/all.py --out docs/benchmarks [--lengths 512 … 32768] [--devices cpu cuda] [--runs …]

Layers with their projections (hidden size 256, 4 heads, batch 1, no padding): forward pass and training step. Decoders
of 2 layers: one generated token after `length` others. Contenders take turns within a round, and rounds are repeated,
so that temporary slowdowns of the machine affect all of them (benchmarks/attention.py).

<out>.json holds every single time and grows with each length: running the command again resumes an interrupted
measurement, and measures what is missing together with full attention. Configurations that do not fit into memory are
recorded and skipped. <out>.md has the tables, and the exponents of time in the length, fitted where arithmetic
dominates, next to those of the arithmetic; <out>_<device>_<mode>.png has the curves, and <out>_<device>_bubbles.png
quality against speed, with the quality taken from finished runs (`--runs docs/results.json --task zoo_era`). If nothing
is missing, the pages are rewritten, on any machine. Text between the two `notes` marks in <out>.md is kept. `--quick`
tries the script on two short lengths.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log, log2
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from attention import (
    HEADS,
    HIDDEN,
    YARDSTICK,
    Ours,
    TheirBigBird,
    TheirFnet,
    TheirLongformer,
    TheirNystromformer,
    TheirReformer,
    as_rows,
    interleave,
    layer_runs,
    machine,
    table,
)
from generation import VOCABULARY, decoder, megabytes
from torch import nn

from efficient_transformers import VARIANTS, costs

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
FITTED = {"cpu": (2048, 16384), "cuda": (16384, 65536)}  # below, kernel launches dominate on a GPU
MODES = ("forward", "training", "generation")
NOTES = ("<!-- begin:notes -->", "<!-- end:notes -->")
Law = Callable[[int], float]


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    make: builds a layer for a length.
    law: multiplications of the mixer at a length, up to a constant factor.
    family: the panel of the plots.
    slug, fields: variant and its config fields; it is measured in generation if it can be a decoder.
    squares: number of n² matrices that a pass holds at least; used to skip what does not fit into memory.
    shortest: least length that the layer supports.
    cuda_only: the layer cannot be trained on a CPU.
    """

    make: Callable[[int], nn.Module]
    law: Law
    family: str
    slug: str | None = None
    fields: dict[str, Any] | None = None
    squares: int = 0
    shortest: int = 1
    cuda_only: bool = False

    @property
    def generates(self) -> bool:
        return self.slug is not None and VARIANTS[self.slug].causal

    def least_bytes(self, length: int, itemsize: int, mode: str) -> int:
        """Lower bound on the memory of a run: materialised matrices, and parameters, which may be as large."""
        numbers = self.squares * length**2 * (mode != "generation")
        if self.slug is not None:
            with torch.device("meta"):
                parameters = self.make(length).parameters()
            # each has a gradient and the random numbers it is initialised from
            numbers += 3 * sum(parameter.numel() for parameter in parameters)
        return numbers * itemsize


def ours(slug: str, changes: dict | None = None, squares: int = 0, implementation: str = "sdpa") -> Contender:
    """A layer of a variant, with the benchmark settings of its row in the registry, updated with `changes`."""
    variant = VARIANTS[slug]
    fields = {**variant.benchmark, **(changes or {})}
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 1}

    def law(length: int) -> float:
        if slug == "fnet":  # fast Fourier transforms are not matrix products
            return length * log2(length)
        config = variant.config_class(**sizes, **fields, max_position_embeddings=length)
        # a mixer without matrix products is linear in the tokens
        return costs.attention_flops(config, length) or length

    make: Callable[[int], nn.Module] = lambda length: Ours(slug, fields, length, implementation)  # noqa: E731
    name = slug if implementation == "sdpa" else None
    return Contender(make, law, variant.family, name, fields, squares, cuda_only=implementation == "flex_attention")


def theirs(make: Callable[[int], nn.Module], law: Law, squares: int = 0, shortest: int = 1) -> Contender:
    return Contender(make, law, "transformers", squares=squares, shortest=shortest)


CONTENDERS = {
    YARDSTICK: ours(YARDSTICK),
    "full, eager": ours("full", squares=4 * HEADS, implementation="eager"),
    "local, flex": ours("local", implementation="flex_attention"),
    **{slug: ours(slug) for slug in VARIANTS if slug != YARDSTICK},
    "transformers longformer": theirs(lambda n: TheirLongformer(n, 256), lambda n: n, shortest=256),
    # always materialises and returns its weights
    "transformers big_bird": theirs(TheirBigBird, lambda length: length, squares=HEADS, shortest=1024),
    "transformers reformer": theirs(TheirReformer, lambda length: length),
    "transformers fnet": theirs(TheirFnet, lambda length: length * log2(length)),
    "transformers nystromformer": theirs(TheirNystromformer, lambda length: length),
}


def projections(name: str) -> float:
    """Number of e×e products per token in the linear layers of a contender's mixer; four for those not in the zoo."""
    variant = VARIANTS.get(name.removeprefix("transformers ").partition(",")[0])
    if variant is None:
        return 4
    with torch.device("meta"):
        layer = Ours(variant.slug, dict(variant.benchmark), length=1)
    return sum(linear.weight.numel() for _, linear in costs.linears(layer, variant)) / HIDDEN**2


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def able(names: Iterable[str], length: int, mode: str, device: str) -> list[str]:
    """Contenders that can run at this length and mode on this device."""

    def is_able(contender: Contender) -> bool:
        there = not contender.cuda_only or device == "cuda"
        return there and contender.shortest <= length and (contender.generates or mode != "generation")

    return [name for name in names if is_able(CONTENDERS[name])]


def missing(rows: Iterable[dict], wanted: Iterable[str], where: dict[str, Any]) -> list[str]:
    """Contenders without a row at `where`, preceded by the yardstick if there are any."""
    there = {row["layer"] for row in rows if where.items() <= row.items()}
    names = [name for name in wanted if name not in there]
    return [YARDSTICK, *(name for name in names if name != YARDSTICK)] if names else []


def skipped(name: str, where: dict[str, Any], reason: str) -> dict:
    return {"layer": name, **where, "skipped": reason}


def tried(name: str, build: Callable[[], Any], where: dict[str, Any], device: torch.device) -> tuple[Any, dict | None]:
    """Return the result of `build`, or a row with the reason for skipping it: memory, or an error in transformers."""
    dtype = getattr(torch, where["dtype"])
    needed, free = CONTENDERS[name].least_bytes(where["length"], dtype.itemsize, where["mode"]), free_bytes(device)
    if needed > 0.7 * free:
        return None, skipped(name, where, f"needs {needed / 2**30:.0f} GB and more, {free / 2**30:.0f} are free")
    try:
        return build(), None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, skipped(name, where, "out of memory")
    except RuntimeError as error:
        if CONTENDERS[name].family != "transformers":
            raise
        return None, skipped(name, where, str(error).splitlines()[0])


def made_on(device: torch.device, dtype: torch.dtype, make: Callable[[], nn.Module]) -> nn.Module:
    """Build on the device: a gate over 65,536 tokens has 4 billion weights, which take a CPU a minute to draw."""
    with device:
        module = make()
    return module.to(device, dtype)


def measure_layers(names: list[str], where: dict[str, Any], device: torch.device, repeats: int, budget: float):
    """Rows of forward passes or training steps, by `where["mode"]`."""
    torch.manual_seed(0)
    length, dtype, mode = where["length"], getattr(torch, where["dtype"]), where["mode"]
    hidden = torch.randn(1, length, HIDDEN, dtype=dtype, device=device)
    runs, rows = {}, []
    for name in names:

        def build(name: str = name) -> Callable[[], None]:
            layer = made_on(device, dtype, lambda: CONTENDERS[name].make(length))
            run = layer_runs({name: layer}, hidden)[name, mode]
            run()
            return run

        run, failed = tried(name, build, where, device)
        if failed is None:
            runs[name, mode] = run
        else:
            rows.append(failed)
    found = as_rows(runs, interleave(runs, device, repeats, budget), length, dtype, device)
    return [row | where for row in found] + rows


@torch.no_grad()
def measure_generation(names: list[str], where: dict[str, Any], device: torch.device, repeats: int, budget: float):
    """Rows for one token after `length` others, which a forward pass over random tokens has put into the cache."""
    torch.manual_seed(0)
    length, dtype = where["length"], getattr(torch, where["dtype"])
    ids, token = torch.randint(VOCABULARY, (1, length), device=device), torch.tensor([[7]], device=device)
    runs, caches, rows = {}, {}, []
    for name in names:

        def build(name: str = name) -> tuple[Callable[[], None], Any]:
            contender = CONTENDERS[name]
            longest = length + repeats + 8
            model: Any = made_on(device, dtype, lambda: decoder(contender.slug, contender.fields, longest))  # type: ignore[arg-type]
            cache = model(ids, logits_to_keep=1).past_key_values
            return lambda: model(token, past_key_values=cache), cache

        built, failed = tried(name, build, where, device)
        if failed is None:
            runs[name], caches[name] = built
        else:
            rows.append(failed)
    times = interleave(runs, device, repeats, budget)
    for name, values in times.items():
        rows.append({
            "layer": name, **where, "milliseconds": [round(1e3 * value, 4) for value in values],
            "median": 1e3 * statistics.median(values),
            "of_full": statistics.median(x / full for x, full in zip(values, times[YARDSTICK], strict=True)),
            "megabytes": megabytes(caches[name]),
        })  # fmt: skip
    return rows


def write_json(path: Path, found: dict) -> None:
    """Write atomically: a killed run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def note_machine(found: dict, device: str, described: dict, path: Path) -> None:
    """Record the machine in `found`. Raises SystemExit if it holds times of another, which are not comparable."""
    if (before := found["machines"].setdefault(device, described)) != described:
        raise SystemExit(
            f"{path} holds times of {before}, but this is {described}: choose another --out, or remove the file."
        )


def measure_all(arguments: argparse.Namespace) -> dict:
    """Measure the missing rows and return all rows. If none is missing, the machine may be another one."""
    path = arguments.out.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {"machines": {}, "rows": []}
    for device in arguments.devices:
        for length in arguments.lengths:
            for mode in arguments.modes:
                for dtype in arguments.dtypes:
                    where = {"device": device, "dtype": dtype, "length": length, "mode": mode}
                    names = missing(found["rows"], able(arguments.only, length, mode, device), where)
                    if not names:
                        continue
                    note_machine(found, device, machine(torch.device(device)), path)
                    measure = measure_generation if mode == "generation" else measure_layers
                    rows = measure(names, where, torch.device(device), arguments.repeats, arguments.budget)
                    known = {row["layer"] for row in found["rows"] if where.items() <= row.items()}
                    found["rows"] += [row for row in rows if row["layer"] not in known]
                    write_json(path, found)
                    print(f"{device}, {mode}, {dtype}, {length:,} tokens: {len(rows)} contenders", flush=True)
    return found


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """Exponent b of y = a·n^b fitted to (n, y) by least squares of logarithms; None for fewer than two points."""
    logs = [(log(n), log(y)) for n, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else None


def exponents(rows: list[dict], name: str) -> tuple[float | None, float | None, float | None]:
    """Exponents of the time, of all multiplications of the layer, and of those of the mixer alone; within FITTED."""
    first, last = FITTED[rows[0]["device"]]
    fitted = {row["length"]: row["median"] for row in rows if row["layer"] == name and "median" in row}
    fitted = {n: y for n, y in fitted.items() if first <= n <= last}
    law, count = CONTENDERS[name].law, projections(name)
    return (
        exponent(fitted.items()),
        exponent((n, law(n) + 2 * count * n * HIDDEN**2) for n in fitted),
        exponent((n, law(n)) for n in fitted),
    )


def exponent_table(rows: list[dict], mode: str) -> str:
    first, last = FITTED[rows[0]["device"]]
    lines = [
        f"### {mode}: exponents in the length, {first:,} to {last:,} tokens\n",
        "| layer | time | multiplications of the layer | of the mixer |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["layer"] for row in rows):
        values = exponents(rows, name)
        if values[0] is not None:
            lines.append(f"| {name} | " + " | ".join("-" if x is None else f"{x:.2f}" for x in values) + " |")
    return "\n".join(lines) if len(lines) > 3 else ""


def groups(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Measured rows by device, dtype and mode, in ascending order of length."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if "median" in row:
            found.setdefault((row["device"], row["dtype"], row["mode"]), []).append(row)
    return found


def written_notes(path: Path) -> str:
    """Return the text between the `notes` marks of an existing page, or an empty string."""
    text = path.read_text() if path.exists() else ""
    return text.partition(NOTES[0])[2].partition(NOTES[1])[0].strip()


def report(found: dict, pictures: list[Path], notes: str) -> str:
    """The page: machines, notes, tables, exponents, skipped configurations, pictures."""
    parts = ["# All variants, side by side"]
    for device, described in found["machines"].items():
        parts.append(f"{device}: " + ", ".join(f"{key} {value}" for key, value in described.items()))
    parts.append(
        "Measured by `python benchmarks/all.py`: milliseconds ± half the interquartile range, in brackets the time "
        "relative to full attention (SDPA) in the same run, and peak memory in MB above that of the input. Generation: "
        "the time of one token after N others, and the size of the cache. Every layer includes its projections, which "
        "are linear in N."
    )
    parts += [part for part in (NOTES[0], notes, NOTES[1]) if part]
    for (device, dtype, mode), rows in groups(found["rows"]).items():
        parts += [f"## {mode} on {device}", table(rows, dtype, mode)]
        if mode != "generation":
            parts += filter(None, [exponent_table(rows, mode)])
    left = [row for row in found["rows"] if "skipped" in row]
    if left:
        keys = ("device", "mode", "dtype", "length", "layer", "skipped")
        parts.append("## Skipped\n\n" + "\n".join("- " + ", ".join(str(row[key]) for key in keys) for row in left))
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def draw_curves(rows: list[dict], title: str, path: Path) -> None:
    """One panel per family, with full attention in each; the legend has fitted exponents, and in brackets the layer's.

    Generation has no exponents: its time follows the size of the cache, not the length.
    """
    families = list(dict.fromkeys(contender.family for contender in CONTENDERS.values()))
    rows_of_panels = -(-len(families) // 3)
    figure, panels = plt.subplots(
        rows_of_panels, 3, figsize=(15, 4.5 * rows_of_panels), layout="constrained", sharex=True, sharey=True
    )
    for axes in panels.flat[len(families) :]:
        axes.set_axis_off()
    for axes, family in zip(panels.flat, families, strict=False):
        names = [name for name in CONTENDERS if CONTENDERS[name].family == family and not name.startswith("full")]
        if not any(row["layer"] in names for row in rows):
            axes.set_axis_off()
            continue
        for number, name in enumerate([YARDSTICK, "full, eager", *names]):
            points = [(row["length"], row["median"]) for row in rows if row["layer"] == name]
            if not points:
                continue
            label = name.removeprefix("transformers ")
            time, law, _ = exponents(rows, name)
            if time is not None and rows[0]["mode"] != "generation":
                label += f" {time:.2f} ({law:.2f})"
            style = {"color": "black", "linestyle": ("-", ":")[number]} if number < 2 else {}
            axes.plot(*zip(*points, strict=True), marker="so^vDPX*"[number % 8], markersize=5, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(family)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, framealpha=0.5)
    figure.supxlabel("tokens")
    figure.supylabel("milliseconds")
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def read_quality(runs: Path | None, task: str | None, metric: str) -> tuple[dict[str, float], int]:
    """Mean of a test metric over the finished runs of each variant, by slug, and the greatest length of any run.

    If a variant has runs of several lengths, the longest counts. `runs` is a folder of runs, or a file written by
    training/report.py; `task` is the name of a file in configs.
    """
    if runs is None:
        return {}, 0
    if runs.is_dir():
        found = [json.loads(path.read_text()) for path in sorted(runs.rglob("metrics.json"))]
    else:
        found = json.loads(runs.read_text())["runs"]
    scores: dict[str, dict[int, list[float]]] = {}
    for run in found:
        config = str(run["settings"].get("config")).split("/")
        if metric in run["test"] and task in (None, config[0]):
            by_length = scores.setdefault(run["model"]["model_type"].removeprefix("et_"), {})
            by_length.setdefault(run["model"]["max_length"], []).append(run["test"][metric])
    longest = max((length for by_length in scores.values() for length in by_length), default=0)
    return {slug: statistics.mean(by_length[max(by_length)]) for slug, by_length in scores.items()}, longest


def draw_bubbles(rows: list[dict], quality: dict[str, float], wanted: int, metric: str, title: str, path: Path) -> None:
    """Plot quality against tokens per second of a training step; areas are memory.

    The speed is that at `wanted` tokens, the length of the quality runs, or at the nearest length measured for all.
    """
    names = {row["layer"] for row in rows} & quality.keys()
    lengths = set.intersection(*({row["length"] for row in rows if row["layer"] == name} for name in names))
    length = min(lengths, key=lambda n: abs(n - wanted))
    shown = sorted((r for r in rows if r["layer"] in names and r["length"] == length), key=lambda r: r["median"])
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    largest = max(row["megabytes"] or 1 for row in shown)
    for row in shown:
        speed, memory = 1e3 * length / row["median"], row["megabytes"] or 1
        axes.scatter(speed, quality[row["layer"]], s=20 + 2500 * memory / largest, alpha=0.5, edgecolors="black")
    axes.set_xscale("log")
    axes.margins(0.2)
    figure.canvas.draw()  # texts have a position from here on
    taken: list[Any] = []
    for row in shown:  # move a text up or down until it overlaps no other
        at = 1e3 * length / row["median"], quality[row["layer"]]
        label = f"{row['layer']} ({row['megabytes'] or 0:,.0f} MB)"
        text = axes.annotate(label, at, (6, 0), textcoords="offset points", fontsize=8, va="center")
        for number in range(1, 60):
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.set_position((6, (number + 1) // 2 * 3 * (-1) ** number))
        taken.append(text.get_window_extent())
    axes.set_xlabel(f"tokens per second, training step of a layer at {length:,} tokens")
    axes.set_ylabel(f"test {metric}, mean of the finished runs")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_all(found: dict, out: Path, quality: dict[str, float], wanted: int, metric: str) -> list[Path]:
    pictures = []
    for (device, dtype, mode), rows in groups(found["rows"]).items():
        pictures.append(out.with_name(f"{out.name}_{device}_{dtype}_{mode}.png"))
        what = "one token after others" if mode == "generation" else "measured exponents, of the arithmetic in brackets"
        draw_curves(rows, f"{mode}, {device}, {dtype}: {what}", pictures[-1])
        if mode == "training" and quality.keys() & {row["layer"] for row in rows}:
            pictures.append(out.with_name(f"{out.name}_{device}_{dtype}_bubbles.png"))
            draw_bubbles(rows, quality, wanted, metric, f"Areas are memory: {device}, {dtype}", pictures[-1])
    return pictures


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--budget", type=float, default=60, help="seconds per length, beyond the first three rounds")
    parser.add_argument("--runs", type=Path, help="for the plot of quality: a folder of runs, or docs/results.json")
    parser.add_argument("--task", help="name of the runs' file in configs, e.g. zoo_era (default: all runs)")
    parser.add_argument("--metric", default="accuracy", help="metric on the test split")
    parser.add_argument("--quick", action="store_true", help="64 and 128 tokens, three rounds")
    parser.add_argument("--out", type=Path, required=True, help="write <out>.json, <out>.md and pictures next to them")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.lengths, arguments.repeats = (64, 128), 3
    if YARDSTICK not in arguments.only:
        arguments.only = [YARDSTICK, *arguments.only]
    found = measure_all(arguments)
    quality, length = read_quality(arguments.runs, arguments.task, arguments.metric)
    pictures = draw_all(found, arguments.out, quality, length, arguments.metric)
    page = arguments.out.with_suffix(".md")
    page.write_text(report(found, pictures, written_notes(page)))
    print(f"wrote {arguments.out}.json, {arguments.out}.md and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
