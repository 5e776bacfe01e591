"""Measure whole transformers models with `attn_implementation` "sdpa", "eager" and "efficient", with random weights.

    python benchmarks/any_model.py [--out docs/any_model_speed] [--shapes modernbert gemma3 mistral bert]
        [--lengths 128 512 2048 4096 8192 16384] [--repeats 5] [--budget 120] [--layers N]

The shapes are those of ModernBERT-base, Gemma-3-270m (without its head, with a small vocabulary), a small Mistral (8
layers, hidden size 1,024, 16 heads over 4, window 1,024) and BERT-base, which also runs with the rule
`local:128 | global:1`. Inputs are one row of each length, and a batch of four rows of unequal lengths. Forward pass and
training step; above 8,192 tokens only the forward pass, and eager attention up to 4,096. The implementations take
turns. Memory is the peak during a pass above that before it. Writes <out>.json and <out>.md; results that are already
in <out>.json are not measured again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention import interleave, machine, peak_megabytes, spread
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    Gemma3TextConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from efficient_transformers import set_attention

VOCABULARY, LONGEST_TRAINING, LONGEST_EAGER = 4096, 8192, 4096
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RULE = "local:128 | global:1"
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "modernbert": lambda: ModernBertConfig(**TOKENS, cls_token_id=1, sep_token_id=2, max_position_embeddings=16384),
    "gemma3": lambda: Gemma3TextConfig(
        **TOKENS, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
    ),
    "mistral": lambda: MistralConfig(
        **TOKENS, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, sliding_window=1024,
    ),
    "bert": lambda: BertConfig(
        **TOKENS, max_position_embeddings=16384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}  # fmt: skip


def build(shape: str, layers: int | None) -> PreTrainedModel:
    config = SHAPES[shape]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if shape == "bert" else {}
    return AutoModel.from_config(config, attn_implementation="sdpa", **options)


def contenders(shape: str, length: int) -> list[str]:
    """Implementations to compare; a rule runs under "efficient"."""
    return ["sdpa", "efficient", *([RULE] if shape == "bert" else []), *(["eager"] if length <= LONGEST_EAGER else [])]


def choose(model: PreTrainedModel, contender: str) -> None:
    """Set an implementation, or a rule."""
    ruled = contender == RULE
    if ruled or model.config.efficient_attention is not None:
        set_attention(model, RULE if ruled else None)
    model.set_attn_implementation("efficient" if ruled else contender)


def batch_of(length: int, unequal: bool) -> dict[str, Tensor]:
    """One row of `length` tokens, or four rows with `length`, a half, a quarter and an eighth of it."""
    lengths = torch.tensor([length, length // 2, length // 4, length // 8] if unequal else [length])
    keep = torch.arange(length) < lengths[:, None]
    return {"input_ids": torch.randint(3, VOCABULARY, keep.shape) * keep, "attention_mask": keep.long()}


def runs_of(
    model: PreTrainedModel, shape: str, length: int, unequal: bool
) -> dict[tuple[str, str], Callable[[], None]]:
    batch = batch_of(length, unequal)
    options = {} if shape in ("modernbert", "bert") else {"use_cache": False}

    def forward(contender: str) -> None:
        choose(model.eval(), contender)
        with torch.no_grad():
            model(**batch, **options)

    def train(contender: str) -> None:
        choose(model.train(), contender)
        out = model(**batch, **options).last_hidden_state
        (out * batch["attention_mask"][..., None]).sum().backward()
        model.zero_grad()

    modes = {"forward": forward, **({"training": train} if length <= LONGEST_TRAINING else {})}
    return {
        (contender, mode): (lambda run=run, contender=contender: run(contender))
        for mode, run in modes.items()
        for contender in contenders(shape, length)
    }


def measure(shape: str, length: int, unequal: bool, layers: int | None, repeats: int, budget: float) -> list[dict]:
    runs, device = runs_of(build(shape, layers), shape, length, unequal), torch.device("cpu")
    times, rows = interleave(runs, device, repeats, budget), []
    for (contender, mode), values in times.items():
        ratios = [sdpa / value for value, sdpa in zip(values, times["sdpa", mode], strict=True)]
        rows.append({
            "shape": shape, "length": length, "unequal": unequal, "layers": layers, "contender": contender,
            "mode": mode, "milliseconds": [round(1e3 * value, 2) for value in values],
            "median": 1e3 * statistics.median(values), "faster": statistics.median(ratios),
            "megabytes": peak_megabytes(runs[contender, mode], device),
        })  # fmt: skip
    return rows


def report(found: dict[str, Any]) -> str:
    lines = [
        "# Whole transformers models, with and without `efficient`\n",
        "Median milliseconds (speed relative to sdpa), MB above weights and input; float32, random weights, "
        "measured by `python benchmarks/any_model.py`.\n",
        ", ".join(f"{name}: {value}" for name, value in found["machine"].items()) + "\n",
    ]
    rows = found["rows"]
    for mode in ("forward", "training"):
        for unequal in (False, True):
            some = [row for row in rows if row["mode"] == mode and row["unequal"] == unequal]
            lengths = sorted({row["length"] for row in some})
            if not some:
                continue
            which = "four rows of N, N/2, N/4 and N/8 tokens" if unequal else "one row of N tokens"
            lines += [f"## {mode}, {which}\n", "| model | | " + " | ".join(f"N = {n:,}" for n in lengths) + " |",
                      "|---|---|" + "---|" * len(lengths)]  # fmt: skip
            for shape, contender in dict.fromkeys((row["shape"], row["contender"]) for row in some):
                cells = []
                for length in lengths:
                    row = next((r for r in some if (r["shape"], r["contender"], r["length"])
                                == (shape, contender, length)), None)  # fmt: skip
                    cells.append("-" if row is None else cell(row))
                lines.append(f"| {shape} | {contender.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def cell(row: dict) -> str:
    memory = "" if row["megabytes"] is None else f", {row['megabytes']:,.0f} MB"
    return f"{row['median']:,.0f} {spread(row)} ({row['faster']:.2f}){memory}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/any_model_speed"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048, 4096, 8192, 16384])
    parser.add_argument("--unequal", nargs="*", type=int, default=[4096], help="longest rows of unequal batches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which 3 rounds are sufficient")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    options = parser.parse_args(arguments)
    path = options.out.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(torch.device("cpu")), "rows": []}
    done = {(row["shape"], row["length"], row["unequal"], row["layers"]) for row in found["rows"]}
    for unequal, lengths in ((False, options.lengths), (True, options.unequal)):
        for length in lengths:
            for shape in options.shapes:
                if (shape, length, unequal, options.layers) in done:
                    continue
                rows = measure(shape, length, unequal, options.layers, options.repeats, options.budget)
                found["rows"] += rows
                for row in rows:
                    print(
                        shape,
                        length,
                        "unequal" if unequal else "",
                        row["mode"],
                        row["contender"],
                        cell(row),
                        flush=True,
                    )
                path.write_text(json.dumps(found, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
