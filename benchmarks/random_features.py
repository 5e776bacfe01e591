"""Measure the error of random features for their kernels, and of Performer for softmax attention, by their number.

    python benchmarks/random_features.py [--out docs/random_features]

256 queries and keys of head size 64 with features from N(0, σ²), and values from N(0, 1). Performer: the softmax kernel
of a query and a key, and the output of softmax attention. RFA: the Gaussian kernel of queries and keys of norm 1.
Errors are root mean squares over pairs and 64 draws of the features, relative to the root mean square of the exact
values. Writes <out>.md and <out>.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_transformers.models.attn_linear import linear_attention
from efficient_transformers.models.ops_feature_maps import (
    FEATURE_MAPS,
    gaussian_projection,
    log_positive_random_features,
    orthogonal_projection,
    trigonometric_random_features,
)

DIM, DRAWS, COUNTS = 64, 64, (16, 32, 64, 128, 256, 512, 1024)
NOTE = """# Random features

Root mean square error relative to the exact values, measured by `python benchmarks/random_features.py`. Every estimate
is unbiased, and its error eventually decreases as 1/√m. But the variance of the softmax kernel grows exponentially with
the squared norms: for queries and keys from N(0, 1), which occur in trained layers, a thousand features are far from
sufficient.
"""


def share(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


def kernel_error(count: int, draw: Callable, features: Callable, exact: Callable, x: Tensor, y: Tensor) -> float:
    projection = draw(DRAWS, count, DIM, torch.Generator().manual_seed(count)).double()
    found = (features(x, projection) * features(y, projection)).sum(-1)
    return share(found, exact(x, y).expand_as(found))


def attention_error(count: int, draw: Callable, q: Tensor, k: Tensor, v: Tensor) -> float:
    projection = draw(DRAWS, count, DIM, torch.Generator().manual_seed(count)).double()
    exact = F.scaled_dot_product_attention(q, k, v)
    scale = DIM**-0.25
    q, k, v = (x.expand(1, DRAWS, -1, -1) for x in (q * scale, k * scale, v))
    return share(linear_attention(q, k, v, FEATURE_MAPS["positive"], projection), exact.expand(1, DRAWS, -1, -1))


def positive(x: Tensor, projection: Tensor) -> Tensor:
    return log_positive_random_features(x, projection).exp()


def softmax_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1).exp()


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (-(x - y).square().sum(-1) / 2).exp()


def curves() -> dict[str, list[float]]:
    q, k, v = torch.randn(3, 1, 1, 256, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (F.normalize(rows[0, 0], dim=-1) for rows in (q, k))
    trigonometric = gaussian_projection, trigonometric_random_features, gaussian_kernel
    found = {"RFA, Gaussian kernel": [kernel_error(m, *trigonometric, x, y) for m in COUNTS]}
    for sigma in (0.25, 0.5, 1.0):
        x, y = (sigma * rows[0, 0] * DIM**-0.25 for rows in (q, k))
        for name, draw in (("independent", gaussian_projection), ("orthogonal", orthogonal_projection)):
            kernel = [kernel_error(m, draw, positive, softmax_kernel, x, y) for m in COUNTS]
            attention = [attention_error(m, draw, sigma * q, sigma * k, v) for m in COUNTS]
            found[f"Performer, N(0, {sigma:g}²), {name} rows, softmax kernel"] = kernel
            found[f"Performer, N(0, {sigma:g}²), {name} rows, softmax attention"] = attention
    return found


def slope(errors: list[float]) -> float:
    """Slope of log error against log m, by least squares."""
    design = torch.stack([torch.tensor(COUNTS, dtype=torch.float64).log(), torch.ones(len(COUNTS)).double()], 1)
    return torch.linalg.lstsq(design, torch.tensor(errors, dtype=torch.float64).log()[:, None]).solution[0].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.png")
    out, found = parser.parse_args().out, curves()
    lines = ["| relative error at m = | " + " | ".join(map(str, COUNTS)) + " | slope |", "|---|" + "---|" * 8]
    for name, errors in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{error:.3f}" for error in errors) + f" | {slope(errors):.2f} |")
    print("\n".join(lines))
    if out is None:
        return
    picture = f"![error against the number of features]({out.with_suffix('.png').name})"
    out.with_suffix(".md").write_text("\n".join([NOTE, *lines, "", picture]) + "\n")
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for name, errors in found.items():
        if "independent" not in name:
            axes.loglog(
                COUNTS, errors, marker="o", label=f"{name.replace(', orthogonal rows', '')}: {slope(errors):.2f}"
            )
    reference = found["RFA, Gaussian kernel"][0] / 2
    axes.loglog(COUNTS, [reference * (COUNTS[0] / m) ** 0.5 for m in COUNTS], "k--", label="1/√m")
    axes.set_xticks(COUNTS, [str(m) for m in COUNTS])
    axes.minorticks_off()
    axes.set_xlabel("random features m (for RFA: pairs of sine and cosine)")
    axes.set_ylabel("relative root mean square error")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="slope of the logarithms")
    axes.grid(alpha=0.3)
    figure.savefig(out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
