"""Conversion: a checkpoint of transformers becomes a variant of the zoo that can hold its weights.

    conversion = convert("google-bert/bert-base-uncased", "local", max_position_embeddings=4096, window_size=128)
    print(conversion.report)
    conversion.save("bert-local")  # config, code, safetensors, tokenizer, report

`layouts` holds the table that a new kind of source adds to, `rules` those for a new variant.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..folders import fit_tokenizer
from ..memory import FLOAT, Estimate, check_model
from ..models.ops_checks import check_at_least
from ..registry import VARIANTS
from .card import Origin, read_origin
from .config import fields_of_source, make_config, reads_blocks
from .layouts import SOURCES
from .positions import anchor_ids, fit_positions
from .report import Report
from .result import Conversion
from .rules import CREATED, DIFFERENCES, POSITIONS
from .sentences import read_modules
from .source import check_source, choose_head, head_of, load_source, name_of, read_config, read_tokenizer
from .weights import blocks_of_eval_mode, checked_blocks, fill, fold_scale, renamed_weights

__all__ = ["CREATED", "SOURCES", "Conversion", "Report", "convert"]


def convert(
    source: str | Path | PreTrainedModel,
    variant: str,
    *,
    head: str | None = None,
    max_position_embeddings: int | None = None,
    positions: Literal["tile", "interpolate"] = "tile",
    block_tables: Sequence[Tensor] | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Conversion:
    """A checkpoint of transformers as a model of `variant`, with the same weights.

    `source` is a Hub name, a folder or a model; its type one of `SOURCES`. `head` is one of the variant's
    (`"MaskedLM"`, …), `"Model"` for the bare body, or None for the source's own. `max_position_embeddings` defaults to
    the source's. A longer table of positions is the source's, tiled (Beltagy et al. 2020, arXiv:2004.05150,
    section 5), or interpolated linearly with its ends kept; a shorter one is cut. `block_tables` are the random blocks
    of `big_bird`, one (heads, blocks, r) tensor per layer, whose row i holds the blocks that block i reads, -1 for
    none. `base_model` is the source's id on the Hub, for the card; `source` itself if it is one. `trust_remote_code`
    lets a tokenizer's own code run. `fields` set the rest of the variant's config. Among them, `anchor_interval` (of
    the variants with a pattern) keeps the first rows of the table and repeats the source's [CLS] and [SEP]: outputs for
    a text up to that length equal the source's, and the mean of those for a longer one is close to the mean over its
    parts, without training.

    A SentenceTransformer (a source with `modules.json`) remains one unless a `head` is given: its other modules are
    kept, and so is the length that it truncates texts to, unless `max_position_embeddings` sets another.

    The source's dtype is kept. Initialised weights come from torch's default generator.

    Raises ValueError for a source, variant, head or field that does not fit, OSError for a source that cannot be read,
    and trust.UntrustedCodeError, which names the code, for a tokenizer that needs code of its own.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant ({variant!r}) must be one of {', '.join(VARIANTS)}.")
    if positions not in ("tile", "interpolate"):
        raise ValueError(f"positions ({positions!r}) must be 'tile' or 'interpolate'.")
    if max_position_embeddings is not None:
        check_at_least("max_position_embeddings", max_position_embeddings, 1, "it is the longest input in tokens")
    source_config = source.config if isinstance(source, PreTrainedModel) else read_config(source)
    check_source(source_config)
    layout = SOURCES[source_config.model_type]
    modules = None if isinstance(source, PreTrainedModel) or head not in (None, "Model") else read_modules(source)
    if modules is not None:
        head = "Model"  # what pooling takes, also of a checkpoint with a language model's head
    source_head = head_of(source, source_config)
    target = VARIANTS[variant]
    head = choose_head(head, source_head, source_config, target)
    kept_head = head if head == source_head else None  # another head's weights may have the same names
    report = Report(name_of(source), source_config.model_type, variant, head)
    report.notes += layout.notes(source_config, kept_head)

    model, unloaded = load_source(source, source_config, head)
    weights = renamed_weights(model, source_config, kept_head, unloaded, report)
    tokenizer = None if isinstance(source, PreTrainedModel) else read_tokenizer(source, report, trust_remote_code)
    origin = Origin(base_model) if isinstance(source, PreTrainedModel) else read_origin(source, base_model, report)

    table = weights[POSITIONS]
    if layout.offset_positions:
        table = table[source_config.pad_token_id + 1 :]
    length = max_position_embeddings or len(table)
    Estimate(weights=FLOAT * length * table.shape[-1]).check()
    interval = fields.get("anchor_interval")
    if interval is not None:
        fields = {"anchor_token_ids": anchor_ids(tokenizer, source_config), **fields}
    weights[POSITIONS] = fit_positions(table, length, positions, interval, report)

    if modules is not None:
        theirs_cut = modules.max_seq_length or getattr(tokenizer, "model_max_length", length)
        modules.max_seq_length = min(max_position_embeddings or theirs_cut, length)
        kept, cut = ", ".join(modules.names), modules.max_seq_length
        report.notes.append(f"sentence-transformers: {kept} kept, texts are truncated to {cut} tokens")

    as_in_eval = block_tables is None and reads_blocks(source_config, variant, fields)
    if as_in_eval or block_tables is not None:
        fields = {"random_blocks": "stored", **fields}
    config = make_config(target, source_config, kept_head, length, tokenizer, block_tables, fields)
    check_model(config)
    if tokenizer is not None:
        fit_tokenizer(tokenizer, config)
    theirs = fields_of_source(source_config)
    if theirs.get("attention_probs_dropout_prob", 0) and not config.attention_probs_dropout_prob:
        report.notes.append("attention_probs_dropout_prob is 0: the variant has no attention weights to drop from")
    if getattr(source_config, "rescale_embeddings", False):
        fold_scale(weights, config, head, report)
    if note := DIFFERENCES.get((source_config.model_type, variant, head or "Model")):
        report.notes.append(note)
    converted: Any = target.model_class(head)(config)  # `to` is typed as a plain function
    converted.to(model.dtype)
    if as_in_eval:
        block_tables = blocks_of_eval_mode(config, report)
    if block_tables is not None:
        weights |= checked_blocks(config, block_tables)
    fill(converted, weights, head is not None, report, layout.created.get(kept_head or "", ()))
    return Conversion(converted.eval(), report, tokenizer, modules, origin)
