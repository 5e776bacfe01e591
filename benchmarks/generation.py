"""Measure time and memory for one generated token against the length of the context.

    python benchmarks/generation.py [--contexts 1024 4096 …] [--out docs/generation]

Decoders of 2 layers, hidden size 256, 4 heads, batch 1, weights drawn from a fixed seed. The cache is filled directly,
with what the layers would store for random keys and values, so that long contexts of full attention need no prefill.
Every round generates one token with each contender in turn; the results are medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from attention import HEADS, HIDDEN, machine
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from efficient_transformers import VARIANTS
from efficient_transformers.models.attn_linear import causal_linear_attention
from efficient_transformers.models.base_kernel_attention import KernelAttention

LAYERS, VOCABULARY = 2, 1024
NOTE = """# Generation

Median milliseconds per token ± half the interquartile range, and in brackets the size of the cache in MB, after
contexts of different lengths, measured by `python benchmarks/generation.py`. Decoders of 2 layers, hidden size 256, 4
heads, batch
1.
"""
CONTENDERS = {
    "full": ("full", {}),
    "local 128": ("local", {"window_size": 128}),
    "efficient": ("efficient", {}),
    "linear": ("linear", {}),
    "rfa, 256 features": ("rfa", {"num_random_features": 128}),
    "rfa, 256 features, gated": ("rfa", {"num_random_features": 128, "gated": True}),
    "performer, 256 features": ("performer", {"num_random_features": 256}),
}


def decoder(slug: str, fields: dict, longest: int) -> PreTrainedModel:
    sizes = {
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "intermediate_size": 4 * HIDDEN, "max_position_embeddings": longest,
        "position_embedding_type": "rotary" if VARIANTS[slug].attention else "none",
    }  # fmt: skip
    config = VARIANTS[slug].config_class(**sizes, **fields)
    return VARIANTS[slug].model_class("CausalLM")(config).eval()


def filled_cache(model: PreTrainedModel, context: int) -> Cache:
    """Return a cache that holds `context` tokens."""
    mixers: list[Any] = [layer.mixer for layer in model.model.layers]
    layers: list[Any] = [mixer.new_cache_layer() for mixer in mixers]
    piece = 1024  # bounded caches drop tokens between updates
    for start in range(0, context, piece):
        for mixer, layer in zip(mixers, layers, strict=True):
            size = min(piece, context - start)
            q, k, v = (torch.randn(1, HEADS, size, HIDDEN // HEADS) for _ in range(3))
            if isinstance(mixer, KernelAttention):
                decay = mixer.log_decay(torch.randn(1, size, HIDDEN), None)
                q, k = mixer.scaled(q, k)
                how = mixer.config.features, mixer.projection, None, decay, layer.state
                layer.update(causal_linear_attention(q, k, v, *how)[1], size)
            else:
                layer.update(k, v, torch.arange(start, start + size)[None])
    return Cache(layers=layers)


def megabytes(cache: Cache) -> float:
    """Memory of everything the cache holds, preallocated space included."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [vars(layer) for layer in cache.layers]
    while waiting:
        held = waiting.pop()
        if isinstance(held, Tensor):
            storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, dict | list | tuple):
            waiting.extend(held.values() if isinstance(held, dict) else held)
    return sum(storages.values()) / 2**20


@torch.no_grad()
def measure(context: int, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    token = torch.tensor([[7]])
    models = {name: decoder(slug, fields, context + repeats + 8) for name, (slug, fields) in CONTENDERS.items()}
    caches = {name: filled_cache(model, context) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(token, past_key_values=caches[name])
            if number >= 2:  # the first steps preallocate the space for the others
                times[name].append(1e3 * (time.perf_counter() - start))
    return [
        {"layer": name, "context": context, "milliseconds": values, "megabytes": megabytes(caches[name])}
        for name, values in times.items()
    ]


def table(rows: list[dict]) -> str:
    contexts = sorted({row["context"] for row in rows})
    by_key = {(row["layer"], row["context"]): row for row in rows}
    lines = [
        "| context | " + " | ".join(f"{c:,}" for c in contexts) + " |",
        "|---|" + "---|" * len(contexts),
    ]
    for name in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for context in contexts:
            values = by_key[name, context]["milliseconds"]
            low, median, high = statistics.quantiles(values, n=4)
            cells.append(f"{median:.2f} ±{(high - low) / 2:.2f} ({by_key[name, context]['megabytes']:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write <out>.json and <out>.md")
    arguments = parser.parse_args()
    rows = [row for context in arguments.contexts for row in measure(context, arguments.repeats)]
    described = machine(torch.device("cpu"))
    text = "\n\n".join([NOTE.strip(), ", ".join(f"{key} {value}" for key, value in described.items()), table(rows)])
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
