"""List the times that became slower, beyond the spread, between two files: `python benchmarks/compare.py OLD NEW`.

The files are those written by the other benchmarks. A time is slower if the lower quartile of the new times is above
the upper quartile of the old ones and the medians differ by more than `--tolerance`. `--relative` compares times
relative to the median of full attention in the same file, which is required for files from different machines. Prints
the slower times, and exits with code 1 if there are any; rows in only one file are counted.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

KEYS = ("device", "dtype", "mode", "length", "context", "layer")
YARDSTICK = "full"


def read(path: Path) -> tuple[Any, dict[tuple, list[float]]]:
    """Return the machines, and the times of each contender in milliseconds."""
    found = json.loads(path.read_text())
    times = {tuple(row.get(key) for key in KEYS): row.get("milliseconds") for row in found["rows"]}
    return found.get("machines") or found["machine"], {key: values for key, values in times.items() if values}


def relative(times: dict[tuple, list[float]]) -> dict[tuple, list[float]]:
    """Divide times by the yardstick's median at the same place; drop the yardstick, and rows without one."""
    medians = {key[:-1]: statistics.median(values) for key, values in times.items() if key[-1] == YARDSTICK}
    return {
        key: [value / medians[key[:-1]] for value in values]
        for key, values in times.items()
        if key[:-1] in medians and key[-1] != YARDSTICK
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, high


def slower(
    old: dict[tuple, list[float]], new: dict[tuple, list[float]], tolerance: float
) -> list[tuple[float, tuple, float, float]]:
    """(ratio, key, old median, new median) of the times that became slower, the largest ratio first."""
    found = []
    for key in old.keys() & new.keys():
        before, after = statistics.median(old[key]), statistics.median(new[key])
        if quartiles(new[key])[0] > quartiles(old[key])[1] and after > (1 + tolerance) * before:
            found.append((after / before, key, before, after))
    return sorted(found, key=lambda entry: -entry[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="relative increase of a median that is accepted")
    parser.add_argument("--relative", action="store_true", help="compare times relative to full attention")
    options = parser.parse_args(arguments)
    (old_machines, old), (new_machines, new) = read(options.old), read(options.new)
    if options.relative:
        old, new = relative(old), relative(new)
    elif old_machines != new_machines:
        print(f"error: different machines, {old_machines} and {new_machines}: pass --relative.", file=sys.stderr)
        return 2
    if not old.keys() & new.keys():
        print("error: the files have nothing in common.", file=sys.stderr)
        return 2
    found = slower(old, new, options.tolerance)
    unit = "of full attention" if options.relative else "ms"
    for ratio, key, before, after in found:
        where = ", ".join(str(part) for part in key if part is not None)
        print(f"{ratio:.2f} times as slow: {where}: {before:.4g} -> {after:.4g} {unit}")
    both = len(old.keys() & new.keys())
    print(f"{len(found)} of {both} slower; only old: {len(old) - both}, only new: {len(new) - both}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
