"""Measure the share of the nearest keys that LSH finds, and its cost, against the number of hashing rounds.

    python benchmarks/lsh_recall.py [--out docs/lsh_recall]

4,096 tokens of head size 64 in 512 families of 8. Each member is the direction of its family plus noise whose norm is a
given multiple of that direction's. A token should find the 7 other members of its family, which are its nearest
neighbours. It attends within the same limits as in Reformer: to tokens of its own bucket (of 128) in its own chunk of
64 and the one before it, in every round of hashing. Means over 4 heads. Writes <out>.md and <out>.png.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from efficient_transformers.models.ops_buckets import sorted_chunks
from efficient_transformers.models.ops_lsh import assign_buckets, random_rotations

FAMILIES, MEMBERS, DIM, HEADS, BUCKETS, CHUNK = 512, 8, 64, 4, 128, 64
ROUNDS, NOISES = (1, 2, 4, 8, 16), (0.2, 0.4, 0.7, 1.0)
NOTE = """# LSH recall

Share of the 7 nearest keys that a token attends to, measured by `python benchmarks/lsh_recall.py`. cos is the mean
cosine between two members of a family. The last row is the share of all pairs of tokens that attend to each other at
noise 1, which is the recall of random pairs. Four rounds, the default, find nearly all keys at a cosine of 0.96 and a
third of those at 0.50.
"""


def recall(noise: float) -> tuple[float, list[float], list[float]]:
    """Mean cosine within a family and, by number of rounds, the recall and the share of pairs attended to."""
    generator = torch.Generator().manual_seed(0)
    centre = F.normalize(torch.randn(1, HEADS, FAMILIES, 1, DIM, generator=generator), dim=-1)
    offset = F.normalize(torch.randn(1, HEADS, FAMILIES, MEMBERS, DIM, generator=generator), dim=-1)
    order = torch.randperm(FAMILIES * MEMBERS, generator=generator)
    family = order // MEMBERS
    x = F.normalize((centre + noise * offset).flatten(2, 3)[:, :, order], dim=-1)
    rotations = random_rotations(HEADS, DIM, max(ROUNDS), [BUCKETS], generator)
    buckets = assign_buckets(x, rotations, [BUCKETS])
    kin = family[:, None] == family
    kin.fill_diagonal_(False)
    found, read = [], []
    for rounds in ROUNDS:
        reads = [
            sorted_chunks(buckets[:, head, None, :rounds], None, CHUNK, causal=False).counts(len(family))[0, 0] > 0
            for head in range(HEADS)
        ]
        found.append(sum(some[kin].float().mean().item() for some in reads) / HEADS)
        read.append(sum(some.float().mean().item() for some in reads) / HEADS)
    return (x[0, 0] @ x[0, 0].T)[kin].mean().item(), found, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.png")
    out = parser.parse_args().out
    curves = {noise: recall(noise) for noise in NOISES}
    lines = ["| recall after rounds: | " + " | ".join(map(str, ROUNDS)) + " |", "|---|" + "---|" * len(ROUNDS)]
    for noise, (cosine, found, _) in curves.items():
        lines.append(f"| noise {noise:g}, cos {cosine:.2f} | " + " | ".join(f"{share:.3f}" for share in found) + " |")
    lines.append("| pairs attended to | " + " | ".join(f"{share:.3f}" for share in curves[NOISES[-1]][2]) + " |")
    print("\n".join(lines))
    if out is None:
        return
    picture = f"![recall against rounds of hashing]({out.with_suffix('.png').name})"
    out.with_suffix(".md").write_text("\n".join([NOTE, *lines, "", picture]) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for cosine, found, _ in curves.values():
        axes.plot(ROUNDS, found, marker="o", label=f"cosine {cosine:.2f}")
    axes.plot(ROUNDS, curves[NOISES[-1]][2], "k--", label="pairs attended to")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ROUNDS, [str(rounds) for rounds in ROUNDS])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rounds of hashing (num_hashes)")
    axes.set_ylabel("share of the 7 nearest keys that are attended to")
    axes.legend(title="within a family")
    axes.grid(alpha=0.3)
    figure.savefig(out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
