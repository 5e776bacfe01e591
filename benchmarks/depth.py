"""Measure peak memory and time of a training step against depth: ordinary, with checkpointing, reversible.

    python benchmarks/depth.py [--out docs/depth]

Local attention ±128, hidden size 256, 4 heads, MLP of 1,024, one sequence of 4,096 tokens, float32. Every point runs in
a separate process: the peak of torch's allocated memory in the second step, above that before the step (so without
weights and their gradients), and the median time of three more steps. The contenders take turns at each depth. Writes
<out>.md and <out>.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from attention import machine
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from efficient_transformers.models.modeling_local import EtLocalConfig, EtLocalModel

LENGTH, DEPTHS = 4096, (2, 4, 8, 16)
WAYS = {
    "ordinary": {},
    "gradient checkpointing": {},
    "reversible": {"reversible": True},
    "reversible, MLP in chunks of 512": {"reversible": True, "chunk_size_feed_forward": 512},
}
NOTE = """# Memory and depth

Peak memory of a training step in MB, above that of weights and gradients, and milliseconds, measured by `python
benchmarks/depth.py`. A reversible layer stores no activations, so the peak is that of one layer and the two streams;
gradient checkpointing stores the input of every layer."""


def peak_megabytes(run: Callable[[], None]) -> float:
    """Peak of the memory allocated by torch during a run, above that before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes: list[tuple[int, int]] = []
    waiting: list[Any] = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[reportOptionalMemberAccess]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(changes))) / 2**20


def measure(way: str, depth: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = EtLocalConfig(vocab_size=64, num_hidden_layers=depth, hidden_dropout_prob=0.0, **WAYS[way])
    model = EtLocalModel(config, add_pooling_layer=False).train()
    if way == "gradient checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, times = torch.randint(64, (1, LENGTH)), []

    def step() -> None:
        model(ids).last_hidden_state.square().mean().backward()

    step()  # allocates the gradients, which later steps add to
    megabytes = peak_megabytes(step)
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"megabytes": megabytes, "milliseconds": statistics.median(times)}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| layers | " + " | ".join(map(str, DEPTHS)) + " |", "|---|" + "---|" * len(DEPTHS)]
    for way, points in rows.items():
        cells = [f"{point['megabytes']:,.0f} MB, {point['milliseconds']:,.0f} ms" for point in points]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for way, points in rows.items():
        axes.plot(DEPTHS, [point["megabytes"] for point in points], marker="o", label=way)
    axes.set_xticks(DEPTHS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layers")
    axes.set_ylabel("MB of a training step of 4,096 tokens")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.png")
    parser.add_argument("--point", nargs=2, metavar=("WAY", "DEPTH"), help="measure one point, in this process")
    arguments = parser.parse_args()
    if arguments.point:
        way, depth = arguments.point
        print(json.dumps(measure(way, int(depth))))
        return
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for depth in DEPTHS:
        for way, points in rows.items():
            command = [sys.executable, __file__, "--point", way, str(depth)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            points.append(json.loads(found.stdout.splitlines()[-1]))
    described = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    print(described, table(rows), sep="\n\n")
    if arguments.out:
        picture = f"![memory against depth]({arguments.out.with_suffix('.png').name})"
        arguments.out.with_suffix(".md").write_text("\n\n".join([NOTE, described, table(rows), picture]) + "\n")
        draw(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
