"""How many of the true top keys a token finds by hashing: recall against the number of rounds, and what it costs.

    python benchmarks/lsh_recall.py [--out docs/lsh_recall]

4,096 tokens of head size 64 in 512 families of 8, each member its family's direction and noise of a given share of its
length. What a token should find are the 7 others of its family, which are nearest to it. It looks where Reformer looks:
in its bucket of 128, within its own chunk of 64 and the one before it, in every round of hashing. Means over 4 heads.
Writes <out>.md and <out>.png.
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
NOTE = """Share of a token's 7 nearest keys that it reads, by `python benchmarks/lsh_recall.py --out docs/lsh_recall`.
cos is the mean cosine between two members of a family. The last row is the share of all pairs of tokens that are read,
at noise 1: what a recall no better than chance would be. Four rounds, the default, find nearly all keys at a cosine of
0.96 and a third of those at 0.50."""


def recall(noise: float) -> tuple[float, list[float], list[float]]:
    """Mean cosine inside a family, and for each number of rounds the recall and the share of pairs that are read."""
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
    lines.append("| pairs read | " + " | ".join(f"{share:.3f}" for share in curves[NOISES[-1]][2]) + " |")
    print("\n".join(lines))
    if out is None:
        return
    picture = f"![recall against rounds of hashing]({out.with_suffix('.png').name})"
    out.with_suffix(".md").write_text("\n".join([*lines, "", NOTE, "", picture]) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for cosine, found, _ in curves.values():
        axes.plot(ROUNDS, found, marker="o", label=f"cosine {cosine:.2f}")
    axes.plot(ROUNDS, curves[NOISES[-1]][2], "k--", label="pairs read")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ROUNDS, [str(rounds) for rounds in ROUNDS])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rounds of hashing (num_hashes)")
    axes.set_ylabel("share of the 7 nearest keys that are read")
    axes.legend(title="inside a family")
    axes.grid(alpha=0.3)
    figure.savefig(out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
