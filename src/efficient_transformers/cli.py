"""The command line `efficient-transformers`; `--help` shows its commands."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from .any_model.report import attention_report
from .cards import costs_of, description_of, measured
from .conversion import SOURCES, convert
from .costs import costs_table
from .errors import check_fields, said
from .exporting import README, export, public_file, select_files
from .memory import check_layers
from .publishing import missing_for_push, push, staged, to_fill_in
from .registry import VARIANTS, variant_of

# longest input of `describe` in tokens, since the costs of a pattern are counted tile by tile
LONGEST = 2**20
# columns of `list`, from cards.measured, and their number formats
MEASURED = {"parameters": ",", "era accuracy": ".3f", "nats/byte": ".3f", "tokens/s": ",.0f"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2, with one line on stderr, for invalid input, as in argparse."""
    top = parser()
    # argparse accepts positional arguments in one place only, but fields may follow any option
    options, rest = top.parse_known_args(arguments)
    if any(text.startswith("-") or "fields" not in options for text in rest):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.fields = dict(map(assignment, [*getattr(options, "fields", ()), *rest]))
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError) as error:
        if options.debug:
            raise
        print("error:", said(error), file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="efficient-transformers", description="A model zoo of efficient self-attention for long documents."
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(required=True, metavar="command")

    cards = Path("model_cards") if Path("model_cards").is_dir() else Path(__file__).parents[2] / "model_cards"
    command = commands.add_parser(
        "list",
        help="show the variants",
        description="Show the variants, with measurements of the models trained for the zoo.",
    )
    command.add_argument("--cards", type=Path, default=cards, metavar="DIR", help="folders that publish.py has written")
    command.set_defaults(run=run_list)

    command = commands.add_parser("describe", help="explain a variant and show its costs at a length")
    command.add_argument("variant", choices=VARIANTS, metavar="variant", help=", ".join(VARIANTS))
    command.add_argument("--length", type=int, default=4096, metavar="N", help="longest input in tokens (4096)")
    command.add_argument("--cards", type=Path, default=cards, metavar="DIR", help="folders that publish.py has written")
    command.add_argument("fields", nargs="*", metavar="field=value", help="fields of the config, e.g. hidden_size=768")
    command.set_defaults(run=run_describe)

    command = commands.add_parser(
        "convert",
        help="convert a checkpoint of transformers to a variant",
        description=f"Convert a checkpoint of transformers ({', '.join(SOURCES)}) to a variant with the same weights.",
    )
    command.add_argument("source", help="Hub name or folder")
    command.add_argument("--to", required=True, metavar="VARIANT", help=", ".join(VARIANTS))
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--head", metavar="H", help="MaskedLM, …, or Model for no head; default: that of the source")
    command.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest input in tokens")
    command.add_argument(
        "--positions", default="tile", choices=("tile", "interpolate"), help="how to extend the position table"
    )
    command.add_argument("--base-model", metavar="ID", help="Hub id of the source, for the card")
    command.add_argument(
        "--anchors", type=int, metavar="N", help="repeat [CLS] and [SEP] every N tokens, and start positions again"
    )
    command.add_argument("--seed", type=int, default=0, help="of weights the source does not have")
    add_trust(command, "tokenizer")
    command.add_argument("fields", nargs="*", metavar="field=value", help="of the variant's config")
    command.set_defaults(run=run_convert)

    command = commands.add_parser(
        "attention",
        help="show the attention and the engine of each layer of any transformers model",
        description="Show, layer by layer, the attention that a transformers model requests, the engine that computes "
        'it with attn_implementation="efficient", and the multiplications of both, in millions, for one sequence.',
    )
    command.add_argument("model", help="Hub name or folder; only the config is needed")
    command.add_argument("--length", type=int, default=4096, metavar="N", help="tokens (4096)")
    command.add_argument(
        "--pattern", metavar="RULE", help="rule to set for all layers first, e.g. 'local:128 | global:1'"
    )
    add_trust(command, "model")
    command.set_defaults(run=run_attention)

    command = commands.add_parser(
        "export",
        help="write a saved model with its code, to open it without this package",
        description="Write a saved model together with its code, so that it opens where this package is not "
        "installed (trust_remote_code=True). `push` uploads the same files.",
    )
    command.add_argument("folder", help="a folder of model_cards, of a training run, or written by save_pretrained")
    command.add_argument("out", help="new or empty folder to write")
    command.set_defaults(run=run_export)

    command = commands.add_parser(
        "push",
        help="upload a saved model to the Hub",
        description="Upload a saved model to the Hub, as a private repository by default. Repeating the command "
        "uploads what is missing. The token is that of `hf auth login` or HF_TOKEN.",
    )
    command.add_argument("folder", help="folder of a training run, or written by save_pretrained, with a model card")
    command.add_argument("repo_id", metavar="repo-id", help="user/name, or a name in your own account")
    command.add_argument("--dry-run", action="store_true", help="only list the files to upload, and problems")
    command.add_argument("--public", action="store_true", help="make a new repository public")
    command.add_argument("--revision", metavar="BRANCH", help="branch to upload to; created if it does not exist")
    command.add_argument("--tag", help="tag for the commit, e.g. v1.0")
    command.add_argument("--collection", help="title, or slug of an existing collection, to add the model to")
    command.set_defaults(run=run_push)
    add_plot(commands)
    return top


def add_trust(command: argparse.ArgumentParser, whose: str) -> None:
    command.add_argument("--trust_remote_code", action="store_true", help=f"run code that comes with the {whose}")


def add_plot(commands: Any) -> None:
    plot = commands.add_parser(
        "plot", help="draw attention patterns", description="Draw the tokens that each token attends to."
    )
    kinds = plot.add_subparsers(required=True, metavar="what")

    command = kinds.add_parser("pattern", help="the matrix of one model, as PNG and SVG")
    command.add_argument("source", help="a variant, or the folder of a checkpoint")
    command.add_argument("--length", type=int, metavar="N", help="tokens; default: 64, or 256 for a checkpoint")
    command.add_argument("--text", help="input of the model; default: a paragraph of 1863")
    command.add_argument(
        "--layer", type=int, metavar="L", help="from 0; default: the first one, and others that differ"
    )
    command.add_argument("--heads", type=int, default=4, metavar="H", help="maximum number of panels")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights of a variant")
    command.add_argument(
        "--out", type=Path, metavar="STEM", help="write STEM.png and STEM.svg; default: the name of the source"
    )
    add_trust(command, "tokenizer")
    command.add_argument("fields", nargs="*", metavar="field=value", help="of the variant's config")
    command.set_defaults(run=run_plot_pattern)

    command = kinds.add_parser("gallery", help="gallery.md and the pictures of all variants")
    command.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="folder to write (docs)")
    command.set_defaults(run=run_plot_gallery)


def assignment(text: str) -> tuple[str, Any]:
    """Parse `field=value`, with the value parsed as JSON if possible."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"{text!r} must have the form field=value.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run_list(options: argparse.Namespace) -> None:
    rows = [("variant", "what it is", "paper", "cost", "causal", *MEASURED)]
    for v in VARIANTS.values():
        found = measured(options.cards, v.slug)
        shown = [format(found[name], how) if name in found else "-" for name, how in MEASURED.items()]
        rows.append((v.slug, v.title, v.paper, v.cost, "yes" if v.causal else "no", *shown))
    print_columns(rows)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run_describe(options: argparse.Namespace) -> None:
    variant, folder = VARIANTS[options.variant], options.cards / f"{options.variant}-era"
    if not 1 <= options.length <= LONGEST:
        raise ValueError(f"--length ({options.length:,}) must lie between 1 and {LONGEST:,} tokens.")
    names = [field.name for field in dataclasses.fields(variant.config_class)]
    check_fields(options.fields, names, variant.config_class.__name__)
    fields = {"max_position_embeddings": options.length, **options.fields}
    if (folder / "config.json").exists():  # the model of the zoo, with another length
        saved = variant.config_class.from_pretrained(folder)
        own = {field.name for field in dataclasses.fields(variant.config_class)}
        fields = {**{name: value for name, value in saved.to_dict().items() if name in own}, **fields}
    config = variant.config_class(**fields)
    check_layers(config)  # nothing is allocated, so that a model of any other size can be described
    with torch.device("meta"):
        model = variant.model_class()(config)
    print(description_of(model, inline="$"))
    print(f"\nModel type {variant.model_type}; heads: {', '.join(variant.heads)}.")
    if not variant.any_length:
        print("Some of its parameters belong to positions: their number depends on max_position_embeddings.")
    sizes = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads"
    print(f"\nWith {sizes} and {config.max_position_embeddings:,} positions, without a head:\n")
    print(costs_table(config, list(costs_of(config, options.length))))
    if found := measured(options.cards, options.variant):
        print(f"\nMeasured ({folder}): " + ", ".join(f"{name} {found[name]:{MEASURED[name]}}" for name in found) + ".")


def run_convert(options: argparse.Namespace) -> None:
    for name in options.fields.keys() & {"source", "variant", "head", "positions", "block_tables", "base_model"}:
        raise ValueError(f"{name!r} is not a field of a config: see --help for its option.")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    fields = {"max_position_embeddings": options.max_position_embeddings, **options.fields}
    if options.anchors is not None:
        fields["anchor_interval"] = options.anchors
    conversion = convert(
        options.source,
        options.to,
        head=options.head,
        positions=options.positions,
        base_model=options.base_model,
        trust_remote_code=options.trust_remote_code,
        **fields,
    )
    conversion.save(options.out)
    print(conversion.report)
    print(f"saved in {options.out}")


def run_attention(options: argparse.Namespace) -> None:
    if options.length < 1:
        raise ValueError(f"--length ({options.length}) must be at least 1 token.")
    layers = attention_report(
        options.model, options.length, options.pattern, trust_remote_code=options.trust_remote_code
    )
    rows = [("layer", "requests", "engine", "before, M", "after, M")]
    before, after = (sum(getattr(layer, name) for layer in layers) for name in ("before", "after"))
    for layer in layers:
        rows.append((layer.name, layer.asks, layer.engine, f"{layer.before / 1e6:,.0f}", f"{layer.after / 1e6:,.0f}"))
    rows.append((f"{len(layers)} layers", "", "", f"{before / 1e6:,.0f}", f"{after / 1e6:,.0f}"))
    print_columns(rows)


def run_plot_pattern(options: argparse.Namespace) -> None:
    from . import plots

    if options.heads < 1:
        raise ValueError(f"--heads ({options.heads}) must be at least 1 panel.")
    model, ids = plots.load_model(
        options.source, options.length, options.text, options.seed, options.fields, options.trust_remote_code
    )
    title = variant_of(model.config).title
    matrices = plots.read_matrices(model, ids, options.layer)
    name = Path(options.source).resolve().name if options.source not in VARIANTS else options.source
    for path in plots.save(plots.pattern_figure(matrices, title, options.heads), options.out or Path(name)):
        print(f"wrote {path}")


def run_plot_gallery(options: argparse.Namespace) -> None:
    from . import plots

    plots.gallery(options.out)
    print(f"wrote {options.out / 'gallery.md'} and its pictures")


def run_export(options: argparse.Namespace) -> None:
    files = export(options.folder, options.out)
    print(f"wrote {len(files)} files to {options.out}: open it with trust_remote_code=True")


def run_push(options: argparse.Namespace) -> None:
    show_upload(options.folder, options.repo_id)
    if not options.dry_run:
        chosen = {name: getattr(options, name) for name in ("public", "revision", "tag", "collection")}
        print(push(options.folder, options.repo_id, **chosen))
    elif missing := missing_for_push(options.folder):
        raise ValueError(f"the folder would not be pushed: {'; '.join(missing)}.")


def show_upload(folder: str, repo_id: str) -> None:
    """Print every file that a push uploads, and every file that it leaves out, with the reason."""
    with staged(folder, repo_id) as upload:
        names = (path.relative_to(upload).as_posix() for path in sorted(upload.rglob("*")) if path.is_file())
        files = [public_file(upload, name) for name in names]
    for file in files:
        print(f"{file.size:>13,}  {'LFS' if file.is_large else '   '}  {file.path}")
    print(f"{sum(file.size for file in files):>13,}  bytes in {len(files)} files to {repo_id}")
    for name, reason in select_files(folder).left_out.items():
        print(f"{'left out':>13}       {name} ({reason})")
    for line in to_fill_in(folder) if (Path(folder) / README).exists() else ():
        print(f"{'to fill in':>13}       {line}")


if __name__ == "__main__":
    sys.exit(main())
