"""Measure time and memory of attention layers against sequence length, with all contenders interleaved.

    python benchmarks/attention.py [--suite fixed_patterns] [--lengths 512 1024 …] [--dtypes float32 …]
        [--out docs/fixed_patterns]

Suites: `fixed_patterns` compares the fixed patterns of the zoo; `feature_maps` and `content_based` those families,
bidirectional and causal; `fewer_keys` Linformer, compressed attention and Synthesizer; `attention_free` the mixers
without attention, of which gMLP also replaces the MLP; `longformer_big_bird` these two with the layers of transformers,
by window; `whole_models` encoders of 6 layers. All but the last measure one layer with its projections.
Hidden size 256, 4 heads, batch 1, no padding, no dropout, weights and inputs drawn from a fixed seed.
Every round runs all contenders one after another, so that temporary slowdowns of the machine affect all of them.
Results are medians, and times relative to full attention through torch's SDPA in the same run.
Writes <out>.json with every single time and a description of the machine, and <out>.md with the tables. Results in
<out>.json from the same machine and versions are kept unless the same length and dtype are measured again.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    FNetConfig,
    LongformerConfig,
    LongformerModel,
    NystromformerConfig,
    ReformerConfig,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_mixer import OwnValues, SequenceInfo

HIDDEN, HEADS = 256, 4
YARDSTICK = "full"
OURS = {
    "full": ("full", {}),
    "local ±128": ("local", {"window_size": 128}),
    "local ±64": ("local", {"window_size": 64}),
    "stride 64, 2 hops": ("stride", {"stride": 64, "hops": 2}),
    "global, 2 tokens": ("global", {"num_global_tokens": 2}),
    "mixed": ("mixed", {"head_patterns": ["local:128", "stride:64:2", "global:2", "random:3"]}),
}
FEATURE_MAPS = {
    "efficient": ("efficient", {}),
    "linear": ("linear", {}),
    "rfa, 256 features": ("rfa", {"num_random_features": 128}),
    "performer, 256 features": ("performer", {"num_random_features": 256, "feature_redraw_interval": None}),
}
CONTENT_BASED = {
    "Reformer": ("reformer", {}),
    "Routing": ("routing", {}),
    "Sinkhorn": ("sinkhorn", {}),
}
FEWER_KEYS = {
    "Linformer, 256 keys": ("linformer", {}),
    "Linformer, a matrix per head": ("linformer", {"projection_sharing": "none"}),
    "compressed by 4": ("compressed", {"attention_layers": ["compressed"]}),
    "compressed by 4, causal": ("compressed", {"attention_layers": ["compressed"], "is_decoder": True}),
    "Synthesizer, random": ("synthesizer", {"synthesizer_type": "random"}),
    "Synthesizer, random, causal": ("synthesizer", {"synthesizer_type": "random", "is_decoder": True}),
    "Synthesizer, dense": ("synthesizer", {"synthesizer_type": "dense"}),
    "Synthesizer, factorized dense": ("synthesizer", {"synthesizer_type": "factorized_dense"}),
    "Synthesizer, random+vanilla": ("synthesizer", {"synthesizer_type": "random+vanilla"}),
}
ATTENTION_FREE = {
    "FNet": ("fnet", {}),
    "gMLP": ("gmlp", {}),
    "aMLP": ("gmlp", {"tiny_attention_size": 64}),
    "MLP-Mixer": ("mlp_mixer", {}),
}
PROJECTIONS, LONGFORMER = "projections alone", "transformers Longformer ±128"
WINDOWS = (512, 256, 128)  # Longformer's, both sides together; with one global token
BIG_BIRD: dict[str, Any] = dict(VARIANTS["big_bird"].benchmark)
LAYERS = 6
THEIR_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": 4 * HIDDEN, "vocab_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class Projections(nn.Module):
    """The four linear layers that every contender contains."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.outer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(sum(layer(hidden) for layer in self.inner))


class Ours(nn.Module):
    def __init__(self, slug: str, fields: dict, length: int, implementation: str = "sdpa"):
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": length}
        config = VARIANTS[slug].config_class(**sizes, **fields)
        config._attn_implementation = implementation
        self.layer = VARIANTS[slug].model_class().mixer_class(config, 0)  # type: ignore[attr-defined]
        for module in self.layer.modules():
            if isinstance(module, OwnValues):
                module.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        sequence = SequenceInfo(torch.arange(hidden.shape[1], device=hidden.device)[None])
        mixed = self.layer(hidden, sequence)[0]
        if self.training:
            self.layer.finish_pass(sequence)
        return mixed


class TheirLongformer(nn.Module):
    """Layer of transformers with the first token global, plus an output projection as in the other contenders."""

    def __init__(self, length: int, window: int):
        super().__init__()
        config = LongformerConfig(**THEIR_SIZES, num_hidden_layers=1, attention_window=[window])
        self.layer, self.out = LongformerSelfAttention(config, 0), nn.Linear(HIDDEN, HIDDEN)
        mask = torch.zeros(1, length)
        mask[0, 0] = 10000
        self.register_buffer("mask", mask)
        self.register_buffer("is_global", mask > 0)
        self.register_buffer("is_masked", mask < 0)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.layer(
            hidden,
            attention_mask=self.mask,
            is_index_masked=self.is_masked,
            is_index_global_attn=self.is_global,
            is_global_attn=True,
        )[0]
        return self.out(mixed)


class TheirReformer(nn.Module):
    """LSH layer of transformers with our settings, plus an output projection as in the other contenders."""

    def __init__(self, length: int):
        super().__init__()
        config = ReformerConfig(
            hidden_size=HIDDEN, num_attention_heads=HEADS, attention_head_size=HIDDEN // HEADS, attn_layers=["lsh"],
            num_hashes=4, lsh_attn_chunk_length=64, lsh_attention_probs_dropout_prob=0.0, is_decoder=False,
            max_position_embeddings=length,
        )  # fmt: skip
        self.layer, self.out = LSHSelfAttention(config), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.layer(hidden).hidden_states)


class TheirBigBird(nn.Module):
    """Block-sparse layer of transformers, plus an output projection as in the other contenders."""

    def __init__(self, length: int):
        super().__init__()
        config = BigBirdConfig(**THEIR_SIZES, **BIG_BIRD, max_position_embeddings=length)
        self.layer, self.out = BigBirdBlockSparseAttention(config, seed=0), nn.Linear(HIDDEN, HIDDEN)
        masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), config.block_size)
        for name, mask in zip(("blocked", "band", "rows", "columns"), masks, strict=True):
            self.register_buffer(name, mask)

    def forward(self, hidden: Tensor) -> Tensor:
        masks = (self.band, self.rows, self.columns, self.blocked, self.blocked)
        return self.out(self.layer(hidden, *masks)[0])


class TheirFnet(nn.Module):
    """Fourier transform of transformers, which is the whole mixer."""

    def __init__(self, length: int):
        super().__init__()
        self.layer = FNetBasicFourierTransform(FNetConfig(hidden_size=HIDDEN, use_tpu_fourier_optimizations=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)[0]


class TheirNystromformer(nn.Module):
    """Nyström layer of transformers with 64 landmarks, plus an output projection as in the other contenders."""

    def __init__(self, length: int):
        super().__init__()
        config = NystromformerConfig(**THEIR_SIZES, num_landmarks=64, segment_means_seq_len=length)
        self.layer, self.out = NystromformerSelfAttention(config), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.layer(hidden)[0])


class Model(nn.Module):
    """A whole encoder that takes hidden states as input."""

    def __init__(self, model: nn.Module, **arguments: Tensor):
        super().__init__()
        self.model = model
        for name, value in arguments.items():
            self.register_buffer(name, value)
        self.names = list(arguments)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(inputs_embeds=hidden, **{name: getattr(self, name) for name in self.names}).last_hidden_state


def our_model(slug: str, length: int, **fields) -> Model:
    sizes = {**THEIR_SIZES, "num_hidden_layers": LAYERS, "max_position_embeddings": length, "norm_first": False}
    return Model(VARIANTS[slug].model_class()(VARIANTS[slug].config_class(**sizes, **fields), add_pooling_layer=False))
    # type: ignore[call-arg]


def first_is_global(length: int) -> Tensor:
    return (torch.arange(length) == 0).long()[None]


def fixed_patterns(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections()}
    layers |= {name: Ours(slug, fields, length) for name, (slug, fields) in OURS.items()}
    if length % 256 == 0:  # transformers pads to the window outside of this layer
        layers[LONGFORMER] = TheirLongformer(length, 256)
    return layers


def feature_maps(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections(), YARDSTICK: Ours("full", {}, length)}
    layers |= {name: Ours(slug, fields, length) for name, (slug, fields) in FEATURE_MAPS.items()}
    causal = {"is_decoder": True}
    layers["full, causal"] = Ours("full", causal, length)
    return layers | {
        f"{name}, causal": Ours(slug, fields | causal, length) for name, (slug, fields) in FEATURE_MAPS.items()
    }


def content_based(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections(), YARDSTICK: Ours("full", {}, length)}
    for name, (slug, fields) in CONTENT_BASED.items():
        layers[name] = Ours(slug, fields, length)
        layers[f"{name}, causal"] = Ours(slug, fields | {"is_decoder": True}, length)
    return layers | {"transformers Reformer": TheirReformer(length)}


def fewer_keys(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections(), YARDSTICK: Ours("full", {}, length)}
    return layers | {name: Ours(slug, fields, length) for name, (slug, fields) in FEWER_KEYS.items()}


def attention_free(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections(), YARDSTICK: Ours("full", {}, length)}
    layers |= {name: Ours(slug, fields, length) for name, (slug, fields) in ATTENTION_FREE.items()}
    return layers | {"gMLP, causal": Ours("gmlp", {"is_decoder": True}, length)}


def longformer_big_bird(length: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {PROJECTIONS: Projections(), YARDSTICK: Ours("full", {}, length)}
    for window in WINDOWS:
        fields = {"attention_window": window, "num_global_tokens": 1}
        layers[f"Longformer {window}"] = Ours("longformer", fields, length)
        layers[f"transformers Longformer {window}"] = TheirLongformer(length, window)
    layers["BigBird"] = Ours("big_bird", BIG_BIRD, length)
    layers["transformers BigBird"] = TheirBigBird(length)
    return layers


def whole_models(length: int) -> dict[str, nn.Module]:
    sizes, positions = {**THEIR_SIZES, "num_hidden_layers": LAYERS}, length + 2
    whole: dict[str, nn.Module] = {YARDSTICK: our_model("full", length)}
    for window in WINDOWS:
        fields = {"attention_window": window, "num_global_tokens": 1}
        whole[f"Longformer {window}"] = our_model("longformer", length, **fields)
        config = LongformerConfig(**sizes, max_position_embeddings=positions, attention_window=window)
        theirs = LongformerModel(config, add_pooling_layer=False)
        whole[f"transformers Longformer {window}"] = Model(theirs, global_attention_mask=first_is_global(length))
    whole["BigBird"] = our_model("big_bird", length, **BIG_BIRD)
    if length <= 8192:  # longer ones take transformers some 5 GB per layer in a training step
        config = BigBirdConfig(**sizes, **BIG_BIRD, max_position_embeddings=length)
        whole["transformers BigBird"] = Model(BigBirdModel(config, add_pooling_layer=False))
    return whole


# Each suite with the title of its page.
SUITES = {
    "fixed_patterns": ("Speed of fixed patterns", fixed_patterns),
    "feature_maps": ("Speed of feature maps", feature_maps),
    "content_based": ("Speed of content-based patterns", content_based),
    "fewer_keys": ("Speed of mixers with fewer keys, and of Synthesizer", fewer_keys),
    "attention_free": ("Speed of mixers without attention", attention_free),
    "longformer_big_bird": ("Speed of Longformer and BigBird, next to those of transformers", longformer_big_bird),
    "whole_models": (f"Speed of whole encoders with {LAYERS} layers", whole_models),
}


def run_forward(layer: nn.Module, hidden: Tensor) -> None:
    layer.eval()
    with torch.no_grad():
        layer(hidden)


def run_training(layer: nn.Module, hidden: Tensor) -> None:
    """Forward and backward pass, with gradients of the inputs and all weights."""
    hidden = hidden.detach().requires_grad_()
    layer.train()
    layer(hidden).sum().backward()
    layer.zero_grad()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def peak_megabytes(run: Callable[[], None], device: torch.device) -> float | None:
    """Peak memory during a run above that before it; on a CPU the resident set size, on Linux only."""
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator retains would hide a peak
    reset.write_text("5")  # resets the high-water mark

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    before = kilobytes("VmRSS")
    run()
    return max(0, kilobytes("VmHWM") - before) / 2**10


def interleave(
    runs: dict[Any, Callable[[], Any]], device: torch.device, repeats: int, budget: float
) -> dict[Any, list[float]]:
    """Seconds of all `runs`, one after another in each round: `repeats` rounds, or at least 3 once `budget` is spent.

    A warm-up round is not counted: masks are built, memory is touched, and CUDA kernels are compiled.
    """
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    start = time.perf_counter()
    for number in range(repeats):
        for key, run in runs.items():
            times[key].append(seconds(run, device))
        if number >= 2 and time.perf_counter() - start > budget:
            break
    return times


def layer_runs(layers: dict[str, nn.Module], hidden: Tensor) -> dict[tuple[str, str], Callable[[], None]]:
    """Forward pass and training step of each layer, by (name, mode)."""
    return {
        (name, mode): (lambda layer=layer, run=run: run(layer, hidden))
        for name, layer in layers.items()
        for mode, run in (("forward", run_forward), ("training", run_training))
    }


def measure(
    suite: str, length: int, dtype: torch.dtype, device: torch.device, repeats: int, budget: float
) -> list[dict]:
    """Times of all contenders of a suite at one length."""
    torch.manual_seed(0)
    hidden = torch.randn(1, length, HIDDEN, dtype=dtype, device=device)
    contenders = SUITES[suite][1](length)
    runs = layer_runs({name: layer.to(device, dtype) for name, layer in contenders.items()}, hidden)
    return as_rows(runs, interleave(runs, device, repeats, budget), length, dtype, device)


def as_rows(
    runs: dict[tuple[str, str], Callable[[], None]],
    times: dict[tuple[str, str], list[float]],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict]:
    """Results by (name, mode): all times, their median, the median relative to full attention, and the memory."""
    rows = []
    for (name, mode), values in times.items():
        rows.append({
            "layer": name, "mode": mode, "length": length, "dtype": str(dtype).removeprefix("torch."),
            "milliseconds": [round(1e3 * value, 4) for value in values],
            "median": 1e3 * statistics.median(values),
            "of_full": statistics.median(
                value / full for value, full in zip(values, times[YARDSTICK, mode], strict=True)
            ),
            "megabytes": peak_megabytes(runs[name, mode], device),
        })  # fmt: skip
    return rows


def spread(row: dict) -> str:
    """Half the interquartile range, as a share of the median."""
    values = row["milliseconds"]
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"±{50 * (high - low) / row['median']:.0f} %"


def table(rows: list[dict], dtype: str, mode: str) -> str:
    """Markdown table, a row per layer and a column per length: milliseconds, time relative to full attention, MB."""
    rows = [row for row in rows if row["dtype"] == dtype and row["mode"] == mode]
    lengths = sorted({row["length"] for row in rows})
    by_key = {(row["layer"], row["length"]): row for row in rows}
    lines = [
        f"### {mode}, {dtype}: milliseconds (share of full attention), MB over the input\n",
        "| layer | " + " | ".join(f"N = {length:,}" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for name in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for length in lengths:
            row = by_key.get((name, length))
            if row is None:
                cells.append("-")
                continue
            memory = "" if row["megabytes"] is None else f", {row['megabytes']:,.0f} MB"
            cells.append(f"{row['median']:,.1f} {spread(row)} ({row['of_full']:.3f}){memory}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def page(suite: str, described: dict, rows: list[dict]) -> str:
    """The Markdown page of a suite: what was measured and where, then a table for each dtype and mode."""
    dtypes = dict.fromkeys(row["dtype"] for row in sorted(rows, key=lambda row: row["dtype"] != "float32"))
    return "\n\n".join([
        f"# {SUITES[suite][0]}",
        f"Measured by `python benchmarks/attention.py --suite {suite}`: median milliseconds ± half the interquartile "
        "range, in brackets the time relative to full attention in the same run, and peak memory in MB above that of "
        f"the input. Hidden size {HIDDEN}, {HEADS} heads, batch 1.",
        ", ".join(f"{key} {value}" for key, value in described.items()),
        *(table(rows, dtype, mode) for dtype in dtypes for mode in ("forward", "training")),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="fixed_patterns", choices=SUITES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--budget", type=float, default=40, help="seconds per length, beyond the first three rounds")
    parser.add_argument("--out", type=Path, help="write <out>.json and <out>.md")
    arguments = parser.parse_args()
    device, rows = torch.device(arguments.device), []
    for length in arguments.lengths:
        for dtype in arguments.dtypes:
            found = measure(arguments.suite, length, getattr(torch, dtype), device, arguments.repeats, arguments.budget)
            rows += found
            for mode in ("forward", "training"):
                print("\n" + table(found, dtype, mode), flush=True)
    described = machine(device)
    if arguments.out and (before := arguments.out.with_suffix(".json")).exists():
        earlier = json.loads(before.read_text())
        again = {(row["length"], row["dtype"]) for row in rows}
        if earlier["machine"] == described:
            rows += [row for row in earlier["rows"] if (row["length"], row["dtype"]) not in again]
    text = page(arguments.suite, described, rows)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
