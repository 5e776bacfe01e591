"""Compare the multiplications of one head: in theory, by costs.py, and by torch's counter.

    python benchmarks/operations.py [--out docs/operations]

Theory: (d + d')·N² for QKᵀ and the product with V in the order (QKᵀ)V, and 2·d'·d·N for the order Q(φ(K)ᵀV), where d is
the head size and d' the number of features. A multiplication with its addition counts as one. The additional operations
of the order Q(KᵀV) are the projection of the features and, in decoders, the weights materialised within a chunk.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from efficient_transformers import VARIANTS, costs
from efficient_transformers.models.base_mixer import SequenceInfo

DIM, HEADS = 64, 4
NOTE = """# Operations

Millions of multiplications of one head, measured by `python benchmarks/operations.py`: in theory, by `costs.py`, and
counted by torch. Costs beyond the theory are the projection of the features and, in decoders, the weights materialised
within a chunk.
"""
ROWS = {
    "full": ("full", {}),
    "efficient": ("efficient", {}),
    "linear": ("linear", {}),
    "linear, causal": ("linear", {"is_decoder": True}),
    "rfa, 256 features": ("rfa", {"num_random_features": 128}),
    "rfa, 256 features, causal": ("rfa", {"num_random_features": 128, "is_decoder": True}),
    "performer, 256 features": ("performer", {"num_random_features": 256}),
    "performer, 256 features, causal": ("performer", {"num_random_features": 256, "is_decoder": True}),
}


def row(slug: str, fields: dict, length: int) -> tuple[int, int, int]:
    """Return the multiplications of one head: theory, costs.py, counter."""
    sizes = {"hidden_size": DIM * HEADS, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    config = VARIANTS[slug].config_class(**sizes, max_position_embeddings=length, **fields)
    # the counter does not support the CPU kernel
    config._attn_implementation = "eager" if slug == "full" else "sdpa"
    mixer = VARIANTS[slug].model_class().mixer_class(config, 0).eval()  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(1, length, DIM * HEADS), SequenceInfo(torch.arange(length)[None]))
    projections = 4 * 2 * length * (DIM * HEADS) ** 2
    features = getattr(config, "features_per_head", DIM)
    theory = 2 * DIM * length**2 if slug == "full" else 2 * features * DIM * length
    return (
        theory,
        costs.attention_flops(config, length) // 2 // HEADS,
        (counter.get_total_flops() - projections) // 2 // HEADS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--out", type=Path, help="write <out>.md")
    arguments = parser.parse_args()
    heads = [f"N = {length:,}: {what}" for length in arguments.lengths for what in ("theory", "costs.py", "counted")]
    lines = ["| million multiplications | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, (slug, fields) in ROWS.items():
        numbers = [number for length in arguments.lengths for number in row(slug, fields, length)]
        lines.append(f"| {name} | " + " | ".join(f"{number / 1e6:,.1f}" for number in numbers) + " |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.with_suffix(".md").write_text("\n".join([NOTE, *lines]) + "\n")


if __name__ == "__main__":
    main()
