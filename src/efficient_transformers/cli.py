"""The command line `efficient-transformers`: `list`, `convert` and `plot`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .conversion import SOURCES, convert
from .registry import VARIANTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 1 with one line on stderr for bad input."""
    top = parser()
    # argparse reads positional arguments in one place only; the fields may stand behind any option
    options, rest = top.parse_known_args(arguments)
    if any(text.startswith("-") or "fields" not in options for text in rest):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.fields = dict(map(assignment, [*getattr(options, "fields", ()), *rest]))
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="efficient-transformers", description="A model zoo of efficient self-attention for long documents."
    )
    commands = top.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("list", help="show the variants", description="Show the variants.")
    command.set_defaults(run=run_list)

    command = commands.add_parser(
        "convert",
        help="make a checkpoint of transformers into a variant",
        description=f"Make a checkpoint of transformers ({', '.join(SOURCES)}) into a variant with the same weights.",
    )
    command.add_argument("source", help="Hub name or folder")
    command.add_argument("--to", required=True, metavar="VARIANT", help=", ".join(VARIANTS))
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--head", metavar="H", help="MaskedLM, …, or Model for none; the source's if not given")
    command.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest input in tokens")
    command.add_argument("--positions", default="tile", choices=("tile", "interpolate"), help="how they get longer")
    command.add_argument("--seed", type=int, default=0, help="of weights the source does not have")
    command.add_argument("fields", nargs="*", metavar="field=value", help="of the variant's config")
    command.set_defaults(run=run_convert)

    add_plot(commands)
    return top


def add_plot(commands: Any) -> None:
    plot = commands.add_parser("plot", help="draw what tokens read", description="Draw what tokens read.")
    kinds = plot.add_subparsers(required=True, metavar="what")

    command = kinds.add_parser("pattern", help="the matrix of one model, as PNG and SVG")
    command.add_argument("source", help="a variant, or the folder of a checkpoint")
    command.add_argument("--length", type=int, metavar="N", help="tokens; 64, of a checkpoint 256")
    command.add_argument("--text", help="what the model reads; a paragraph of 1863 if not given")
    command.add_argument("--layer", type=int, metavar="L", help="from 0; the first one, and others that differ")
    command.add_argument("--heads", type=int, default=4, metavar="H", help="most panels")
    command.add_argument("--seed", type=int, default=0, help="of the weights of a variant")
    command.add_argument("--out", type=Path, metavar="STEM", help="STEM.png and STEM.svg; the name if not given")
    command.add_argument("fields", nargs="*", metavar="field=value", help="of the variant's config")
    command.set_defaults(run=run_plot_pattern)

    command = kinds.add_parser("gallery", help="gallery.md and the pictures of all variants")
    command.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="folder to write; docs")
    command.set_defaults(run=run_plot_gallery)


def assignment(text: str) -> tuple[str, Any]:
    """`field=value`, the value read as JSON if it is JSON."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"{text!r} must have the form field=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run_list(options: argparse.Namespace) -> None:
    rows = [("variant", "what it is", "cost", "causal", "paper")]
    rows += [(v.slug, v.title, v.cost, "yes" if v.causal else "no", v.paper) for v in VARIANTS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run_convert(options: argparse.Namespace) -> None:
    for name in options.fields.keys() & {"source", "variant", "head", "positions", "block_tables"}:
        raise ValueError(f"{name!r} is not a field of a config: see --help for its option.")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    conversion = convert(
        options.source,
        options.to,
        head=options.head,
        positions=options.positions,
        **{"max_position_embeddings": options.max_position_embeddings, **options.fields},
    )
    conversion.save(options.out)
    print(conversion.report)
    print(f"saved in {options.out}")


def run_plot_pattern(options: argparse.Namespace) -> None:
    from . import plots

    model, ids = plots.load_model(options.source, options.length, options.text, options.seed, options.fields)
    title = VARIANTS[model.config.model_type.removeprefix("et_")].title
    matrices = plots.read_matrices(model, ids, options.layer)
    name = Path(options.source).resolve().name if options.source not in VARIANTS else options.source
    for path in plots.save(plots.pattern_figure(matrices, title, options.heads), options.out or Path(name)):
        print(f"wrote {path}")


def run_plot_gallery(options: argparse.Namespace) -> None:
    from . import plots

    plots.gallery(options.out)
    print(f"wrote {options.out / 'gallery.md'} and its pictures")


if __name__ == "__main__":
    sys.exit(main())
