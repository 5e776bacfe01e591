"""Weights of the source under the names of the variant, and the values of all others."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.ops_checks import check_entries, check_shape
from .layouts import SOURCES, Creation, Rules
from .report import Report
from .rules import CREATED, LEFT, WITHOUT_ATTENTION, WORDS


def renamed_weights(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    kept_head: str | None,
    unloaded: Mapping[str, Any],
    report: Report,
) -> dict[str, Tensor]:
    """The source's weights under our names, in the form they have below a head (`model.…`)."""
    source = SOURCES[config.model_type]
    rules = (*(source.heads[kept_head] if kept_head else ()), *source.body)
    missing = {*unloaded.get("missing_keys", ()), *(entry[0] for entry in unloaded.get("mismatched_keys", ()))}
    state, weights = model.state_dict(), {}
    absent = {state[name].data_ptr() for name in missing if name in state}  # tied weights have two names
    for name, tensor in state.items():
        short = name.removeprefix(model.base_model_prefix + ".")
        in_body = short.startswith(source.parts)
        if name in missing and in_body:
            raise ValueError(
                f"the source has no {name!r} of the right size: its files must hold every weight of the body."
            )
        if tensor.data_ptr() in absent:
            continue
        parts = [(look_up(part, rules), values) for part, values in source.unpack(short, tensor, config)]
        found = {new: values for new, values in parts if new is not None}
        weights |= found
        report.copied |= dict.fromkeys(found, name)
        if len(found) == len(parts):
            continue
        if in_body:
            raise ValueError(f"the source's weight {name!r} has no counterpart: no variant has such a part.")
        if tensor.data_ptr() not in {weight.data_ptr() for weight in weights.values()}:
            report.left[name] = "no counterpart in the model"
    report.left |= dict.fromkeys(sorted(unloaded.get("unexpected_keys", ())), f"no part of {type(model).__name__}")
    return weights


def look_up(name: str, rules: Rules) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return None if replacement is None else match.expand(replacement)
    return None


def fold_scale(weights: dict[str, Tensor], config: Any, head: str | None, report: Report) -> None:
    """BigBird's `rescale_embeddings` multiplies word embeddings by √e; here they are stored multiplied."""
    if head == "MaskedLM" and config.tie_word_embeddings:
        raise ValueError(
            "the source's rescale_embeddings (True) cannot be folded into word embeddings that are tied to the "
            "language model's head: untie them (tie_word_embeddings=False)."
        )
    weights[WORDS] = weights[WORDS] * config.hidden_size**0.5
    report.notes.append("word embeddings are multiplied by √hidden_size: the source rescales them in its forward")


def blocks_of_eval_mode(config: Any, report: Report) -> list[Tensor]:
    """What transformers reads as random blocks when it does not train: block 0, `num_random_blocks` times over."""
    blocks = -(-config.max_position_embeddings // config.block_size)
    table = torch.zeros(config.num_attention_heads, blocks, config.num_random_blocks, dtype=torch.long)
    full = (5 + 2 * config.num_random_blocks) * config.block_size
    report.notes.append(
        f"random blocks: {config.num_random_blocks} times block 0, which is what transformers reads in eval mode, so "
        "that outputs agree; random_blocks=drawn reads random ones"
    )
    report.notes.append(
        f"short inputs: up to {full} tokens transformers reads everything, this model its blocks at any length"
    )
    return [table] * config.num_hidden_layers


def checked_blocks(config: Any, tables: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tables of random blocks, by the name of their buffers."""
    blocks = -(-config.row_length(config.max_position_embeddings) // config.block_size)
    shape = (config.num_attention_heads, blocks, config.num_random_blocks)
    layers = config.num_hidden_layers
    check_entries("block_tables", tables, "num_hidden_layers", layers, "give one table for each layer")
    for layer, table in enumerate(tables):
        check_shape(f"block_tables[{layer}]", table.shape, shape, "heads, blocks, random blocks")
        wrong = table[(table < -1) | (table >= blocks)]
        if wrong.numel():
            raise ValueError(
                f"block_tables[{layer}] holds {wrong[0].item()}: blocks are numbered 0 to {blocks - 1}, -1 is none."
            )
    return {f"model.layers.{layer}.mixer.random_blocks": table.long() for layer, table in enumerate(tables)}


def fill(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    has_head: bool,
    report: Report,
    created: Sequence[Creation] = (),
) -> None:
    """Give every weight of `model` its value; nothing is left over or left out without a word in the report.

    `created` are the weights that the source's head has here alone; they precede `CREATED`.
    """
    state = {name if has_head else f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    variant = model.config.model_type
    places = LEFT if model.config.attends else (*WITHOUT_ATTENTION, *LEFT)
    for name in [name for name in weights if name not in state]:
        why = next((why for pattern, why in places if re.fullmatch(pattern, name)), None)
        if why is None:
            raise ValueError(f"{variant} cannot hold the source's {report.copied[name]!r}: choose another variant.")
        report.left[report.copied.pop(name)] = why
        del weights[name]
    values = {}
    for name, tensor in state.items():
        if name in weights:
            if weights[name].shape != tensor.shape:
                raise ValueError(
                    f"the source's {report.copied.get(name, name)!r} has shape {tuple(weights[name].shape)} and "
                    f"{variant} needs {tuple(tensor.shape)}: leave out the fields that change sizes (num_labels, …)."
                )
            values[name] = weights[name]
            continue
        creation = next((entry for entry in (*created, *CREATED) if re.fullmatch(entry.pattern, name)), None)
        if creation is None:
            raise ValueError(f"{variant} needs {name!r}, which the source does not have: choose another variant.")
        if creation.like is None:
            values[name] = tensor
        elif isinstance(creation.like, str):
            values[name] = weights[re.sub(creation.pattern, creation.like, name)]
        else:
            values[name] = creation.like(tensor)
        report.created[name] = creation.how
    model.load_state_dict({name if has_head else name.removeprefix("model."): x for name, x in values.items()})
    if not has_head:
        report.copied = {name.removeprefix("model."): old for name, old in report.copied.items()}
        report.created = {name.removeprefix("model."): why for name, why in report.created.items()}
