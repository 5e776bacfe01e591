"""Pictures of the matrices by which models mix positions, and the gallery of all variants.

Needs matplotlib: `pip install 'efficient-transformers[plots]'`. It is imported when something is drawn.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .attention_maps import KINDS, Matrix, read_matrices
from .folders import check_folder
from .memory import check_model
from .registry import VARIANTS, Variant
from .trust import refusing_code

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Their L* values are 100, 26, 84, 67 and 45, so that they also differ in greyscale print.
COLOURS = {"nothing": "#ffffff", "local": "#173b80", "stride": "#6fe3f2", "global": "#ee8a1d", "random": "#6b6b6b"}
# Small enough to see single tokens; weights large enough to distinguish tokens.
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
LONGEST = 2048  # maximum number of tokens, close to the pixels of a picture
# The beginning of the Gettysburg Address (1863), whose repeated words show content-based attention.
TEXT = """Four score and seven years ago our fathers brought forth on this continent a new nation , conceived in
liberty , and dedicated to the proposition that all men are created equal . Now we are engaged in a great
civil war , testing whether that nation , or any nation so conceived and so dedicated , can long endure . We
are met on a great battlefield of that war . We have come to dedicate a portion of that field , as a final
resting place for those who here gave their lives that that nation might live . It is altogether fitting and
proper that we should do this ."""


def new_figure(**arguments: Any) -> "Figure":
    """An empty figure, independent of pyplot's windows and backends. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install 'efficient-transformers[plots]'."
        ) from error
    return Figure(layout="constrained", **arguments)


def word_ids(text: str, length: int, vocab_size: int) -> Tensor:
    """(1, length) int64: an id for each distinct word of `text`, in order of appearance; short texts are repeated."""
    words = text.split()
    if not words:
        raise ValueError("text ('') must contain a word: its words are the tokens of the picture.")
    number = {word: count for count, word in enumerate(dict.fromkeys(words), 1)}
    ids = [number[words[place % len(words)]] % vocab_size for place in range(length)]
    return torch.tensor([ids])


def drawn_model(slug: str, length: int = 64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small bare model of a variant, with weights drawn from `seed`, for pictures of `length` tokens."""
    if slug not in VARIANTS:
        raise ValueError(f"variant ({slug!r}) must be one of {', '.join(VARIANTS)}, or the folder of a checkpoint.")
    variant = VARIANTS[slug]
    settings = {**SIZES, "max_position_embeddings": length, **variant.demo, **changes}
    config = variant.config_class(**settings)
    check_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return variant.model_class()(config).eval()


def load_model(
    source: str,
    length: int | None,
    text: str | None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Tensor]:
    """Load the bare model of a variant, or of a checkpoint with its tokenizer; return it with its input (1, n).

    `trust_remote_code` allows the tokenizer's own code to run; without it, UntrustedCodeError names that code.
    """
    if length is not None and not 1 <= length <= LONGEST:
        raise ValueError(f"length ({length:,}) must lie between 1 and {LONGEST:,}: a picture has few more pixels.")
    if source in VARIANTS or not Path(source).exists():
        model = drawn_model(source, length or 64, seed, **(changes or {}))
        return model, word_ids(text or TEXT, length or 64, model.config.vocab_size)
    if changes:
        raise ValueError(f"{', '.join(changes)} cannot be changed: {source} is a checkpoint. Name a variant instead.")
    check_folder(source)
    with refusing_code(source):
        model = AutoModel.from_pretrained(source, trust_remote_code=trust_remote_code).eval()
    if getattr(model.config, "model_type", "").removeprefix("et_") not in VARIANTS:
        raise ValueError(f"{source} holds {model.config.model_type!r}, which is not a variant of this zoo: convert it.")
    limit = min(length or 256, model.config.max_position_embeddings)
    if getattr(model.config, "image_size", None) is not None:
        raise ValueError(f"{source} is an image model, which has no text input to draw: name its variant instead.")
    with refusing_code(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    ids = tokenizer(text or TEXT, return_tensors="pt")["input_ids"]
    return model, ids.repeat(1, -(-limit // ids.shape[1]))[:, :limit]


def pattern_figure(matrices: Sequence[Matrix], title: str, most: int = 4) -> "Figure":
    """One panel per matrix, for the first `most` of them, with a legend."""
    shown = list(matrices)[:most]
    rows = 2 if len(shown) >= 4 else 1
    columns = -(-len(shown) // rows)
    width = 3.4 * max(columns, 1.35)
    figure = new_figure(figsize=(width, 3.1 * rows + 0.7))
    more = f" ({len(shown)} of {len(matrices)} matrices)" if len(shown) < len(matrices) else ""
    figure.suptitle(title + more, fontsize=12)
    for axes, matrix in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        draw(axes, matrix)
        axes.set_title(matrix.name, fontsize=10)
        axes.set_xlabel(f"{matrix.columns} →", fontsize=9)
        axes.set_ylabel(f"← {matrix.rows}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(integer=True)
    found = {KINDS[number] for matrix in shown if matrix.kinds is not None for number in matrix.kinds.unique().tolist()}
    add_legend(figure, [kind for kind in KINDS[1:] if kind in found])
    return figure


def add_legend(figure: "Figure", kinds: Sequence[str], fontsize: float = 9) -> None:
    from matplotlib.patches import Patch

    if kinds:
        patches = [Patch(facecolor=COLOURS[kind], edgecolor="black", linewidth=0.5, label=kind) for kind in kinds]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=fontsize, frameon=False)


def draw(axes: "Axes", matrix: Matrix, bar: bool = True) -> None:
    """Draw one matrix: the kinds of a pattern, weights from white to dark, or signed values around a middle grey.

    Weights that are exactly zero stay white. The luminance of both scales is monotonic, so that they are legible in
    grey; a colour bar shows the scale.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    how: dict[str, Any] = {"interpolation": "nearest", "aspect": "auto"}
    axes.set_box_aspect(1)
    if matrix.kinds is not None:
        scale = ListedColormap([COLOURS[kind] for kind in KINDS])
        axes.imshow(matrix.kinds.numpy(), cmap=scale, vmin=-0.5, vmax=len(KINDS) - 0.5, **how)
    elif bool((matrix.values < 0).any()):
        limit = matrix.values.abs().max().item()
        image = axes.imshow(matrix.values.numpy(), cmap="cividis", vmin=-limit, vmax=limit, **how)
        if bar:
            axes.figure.colorbar(image, ax=axes, shrink=0.7).ax.tick_params(labelsize=8)
    else:
        read = matrix.values > 0
        scale = ListedColormap(colormaps["YlGnBu"](torch.linspace(0.12, 1, 256).numpy())).with_extremes(bad="white")
        top = torch.quantile(matrix.values[read], 0.99).item()  # a few large weights must not make the others pale
        values = matrix.values.masked_fill(~read, float("nan"))
        image = axes.imshow(values.numpy(), cmap=scale, vmin=0, vmax=top, **how)
        if bar:
            extend = "max" if matrix.values.max() > top * 1.001 else "neither"
            axes.figure.colorbar(image, ax=axes, shrink=0.7, extend=extend).ax.tick_params(labelsize=8)


def save(
    figure: "Figure",
    stem: Path,
    suffixes: Sequence[str] = (".png", ".svg"),
    dpi: int = 110,
    description: str | None = None,
) -> list[Path]:
    """Write the figure to `stem` with each suffix, reproducibly to the byte.

    description: stored in the metadata of the files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=dpi, metadata=metadata | ({"Description": description} if description else {}))
    return paths


def about(variant: Variant) -> tuple[str, str, str]:
    """Headline, formula in TeX, and description, from the docstring of the variant's module."""
    head, *parts = inspect.cleandoc(variant.module.__doc__ or "").split("\n\n")
    formula = next((part for part in parts if part.startswith(".. math::")), "")
    words = [part for part in parts if part != formula]
    tex = " ".join(formula.removeprefix(".. math::").split())
    return tuple(re.sub(r":math:`([^`]*)`", r"$`\1`$", " ".join(text.split())) for text in (head, tex, words[0]))  # type: ignore[return-value]


def gallery(folder: Path) -> None:
    """Write `gallery.md`, its pictures `gallery/<variant>.png`, and the montage `gallery.png` into `folder`."""
    firsts = []
    for slug, variant in VARIANTS.items():
        model = drawn_model(slug)
        matrices = read_matrices(model, word_ids(TEXT, 64, SIZES["vocab_size"]))
        save(pattern_figure(matrices, variant.title), folder / "gallery" / slug, (".png",))
        small = drawn_model(slug, 32)
        firsts.append((variant, read_matrices(small, word_ids(TEXT, 32, SIZES["vocab_size"]))))
    save(montage(firsts), folder / "gallery", (".png",), dpi=140, description=montage_description())
    (folder / "gallery.md").write_text(gallery_page(), encoding="utf-8")


PREFACE = """# Gallery

The matrix of each variant, computed by its code on 64 words of a text: rows are queries, columns are keys. Patterns
are drawn where an attention weight is above zero. The models are small and untrained, with weights drawn from a seed.
The settings are below each picture; everything else is the same for all. `make pages` writes this page and its
pictures; `efficient-transformers plot pattern <variant or checkpoint>` draws one of them, with other settings or for a
trained model."""


def gallery_page() -> str:
    return "\n\n".join([PREFACE, *map(section, VARIANTS.values())]) + "\n"


def section(variant: Variant) -> str:
    headline, formula, words = about(variant)
    lines = [
        f"## {variant.title}",
        f"![the matrix of {variant.title}](gallery/{variant.slug}.png)",
        headline,
        *([f"```math\n{formula}\n```"] if formula else []),
        words,
        f"Cost: {variant.cost}. Causal: {'yes' if variant.causal else 'no'}. Paper: {paper_link(variant)}. "
        f"Model type: `{variant.model_type}`. Drawn with `{demo_settings(variant)}`.",
    ]
    return "\n\n".join(lines)


def demo_settings(variant: Variant) -> str:
    return ", ".join(f"{name}={value}" for name, value in variant.demo.items()) or "defaults"


def paper_link(variant: Variant) -> str:
    number = variant.paper.removeprefix("arXiv:")
    return f"[{variant.paper}](https://arxiv.org/abs/{number})"


def montage(firsts: Sequence[tuple[Variant, Sequence[Matrix]]], columns: int = 5) -> "Figure":
    """One tile per variant, with its cost; four patterns of a variant share its tile."""
    rows = -(-len(firsts) // columns)
    figure = new_figure(figsize=(11.6, 0.6 + 3 * rows))
    tiles = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in tiles[len(firsts) :]:
        axes.set_axis_off()
    for axes, (variant, matrices) in zip(tiles, firsts, strict=False):
        draw(axes, united(matrices), bar=False)
        cost = fill(variant.cost.replace("·", "· "), 29).replace("· ", "·")  # break lines after the dot of a product
        axes.set_title(fill(variant.title, 22), fontsize=13)
        axes.set_xlabel(cost, fontsize=10.5)
        axes.set_xticks([])
        axes.set_yticks([])
    add_legend(figure, KINDS[1:], fontsize=13)
    return figure


def montage_description() -> str:
    """The rows shown in the montage, stored in its file so that a test can compare them with the registry."""
    return "; ".join(f"{v.title}, {v.cost}, {demo_settings(v)}" for v in VARIANTS.values())


def united(matrices: Sequence[Matrix]) -> Matrix:
    """The most informative matrix: weights before patterns and parameters; four patterns side by side."""
    weights = [matrix for matrix in matrices if matrix.kinds is None and matrix.rows == "query"]
    kinds = [matrix.kinds for matrix in matrices if matrix.kinds is not None]
    if weights or len(kinds) != 4:
        return [*weights, *matrices][0]
    gap = 1, 1, 1, 1
    framed = [torch.nn.functional.pad(x, gap) for x in kinds]
    square = torch.cat([torch.cat(framed[:2], 1), torch.cat(framed[2:], 1)])
    return Matrix("four heads", square.double(), square)
