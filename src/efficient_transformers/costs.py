"""Compute the costs of a config at a length: pairs of its pattern, FLOPs of its matrix products, and its memory.

`mixer_costs` counts the token mixers and defines what is counted; this module adds the rest of the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, PreTrainedModel

from .models.base_configuration import EtConfig
from .models.base_pooling import PoolerDense
from .models.modeling_full import EtFullConfig
from .models.ops_patterns import AttentionPattern
from .registry import Variant, variant_of


def pairs(pattern: AttentionPattern, length: int) -> int:
    """The number of (query, key) pairs in one head's pattern over `length` tokens."""
    window = length if pattern.window is None else pattern.window
    total = 0
    for residue in range(min(pattern.dilation, length)):
        count = -(-(length - residue) // pattern.dilation)  # tokens of this residue class
        reach = min(window, count - 1)
        one_side = count * reach - reach * (reach + 1) // 2
        total += count + one_side * (1 if pattern.causal else 2)
    if not pattern.global_spans(length) and not pattern.num_random_blocks and not pattern.in_blocks:
        return total
    # global tokens and random blocks overlap with the window and with each other: count row by row
    position = torch.arange(length)
    return sum(int(pattern.allows(torch.zeros(1, dtype=torch.long), i, position, length).sum()) for i in position)


def attention_flops(config: EtConfig, length: int) -> int:
    """FLOPs between the projections and the output in all layers, for one sequence of `length` tokens."""
    return variant_of(config).flops(config, length)


def forward_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of a forward pass over one sequence of `length` tokens: linear layers and attention."""
    config: EtConfig = model.config  # type: ignore[reportAssignmentType]
    inner = config.row_length(length)
    total = attention_flops(config, length)
    for name, module in linears(model, variant_of(config)):
        once = name.endswith("pooler.dense") or (name == "classifier" and getattr(model, "pools", False))
        rows = 1 if once else inner if ".layers." in f".{name}" else length
        total += 2 * rows * module.in_features * module.out_features
    return total


def linears(module: torch.nn.Module, variant: Variant) -> Iterator[tuple[str, torch.nn.Linear | PoolerDense]]:
    """Yield the linear layers of a module of `variant` with their names, except those counted by `variant.flops`."""
    for name, part in module.named_modules():
        if isinstance(part, (torch.nn.Linear, PoolerDense)) and not any(
            counted in name for counted in variant.linears_in_flops
        ):
            yield name, part


def state_size(config: EtConfig, length: int) -> int:
    """Number of values that a decoder's cache must hold after `length` tokens to predict the next one, at batch size 1.

    Positions, buckets and spare capacity are not counted. If the span of a pattern is finite, a cache drops tokens in
    steps and holds up to one span more between two steps. Raises ValueError for an encoder.
    """
    if not config.is_decoder:
        raise ValueError(f"is_decoder ({config.is_decoder}) must be True: an encoder has no cache.")
    return sum(layer_state_size(config, layer, length) for layer in range(config.num_hidden_layers))


def layer_state_size(config: EtConfig, layer: int, length: int) -> int:
    """The contribution of one layer to `state_size`. Raises ValueError for a variant without a decoder."""
    variant = variant_of(config)
    if variant.state is None:
        raise ValueError(f"the variant ({variant.model_type}) has no decoder and therefore no cache.")
    return variant.state(config, layer, length)


def as_decoder(config: EtConfig) -> EtConfig | None:
    """The config of a decoder with the same fields, or None if the variant has no decoder."""
    if "CausalLM" not in config.heads:
        return None
    config = deepcopy(config)
    try:
        config.is_decoder = True
        config.validate()
    except (ValueError, StrictDataclassError):
        return None
    return config


def costs_table(config: EtConfig, lengths: Sequence[int]) -> str:
    """Markdown table with a row per length: the multiplications of a forward pass and the state of a decoder.

    A multiplication with its addition counts as one. The columns are the whole bare model, its mixers, and full
    attention in a model of the same sizes. Bytes are those of float32. Raises ValueError for a length beyond
    `max_position_embeddings`.
    """
    for length in lengths:
        if not 1 <= length <= config.max_position_embeddings:
            raise ValueError(
                f"length ({length}) must lie between 1 and max_position_embeddings "
                f"({config.max_position_embeddings}): increase max_position_embeddings."
            )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    decoder = as_decoder(config)
    heads = "length", "multiplications, M", "of the mixers, M", "of full attention, M", "decoder state, KB"
    rows: list[Iterable[str]] = [heads, ["---"] * len(heads)]
    same = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "is_decoder"
    full = EtFullConfig(**{name: getattr(config, name) for name in same})
    for length in lengths:
        counts = forward_flops(model, length), attention_flops(config, length), attention_flops(full, length)
        state = "-" if decoder is None else f"{4 * state_size(decoder, length) / 1024:,.1f}"
        rows.append([f"{length:,}", *(f"{count / 2e6:,.1f}" for count in counts), state])
    lines = [f"{parameters:,} parameters, {4 * parameters / 2**20:,.1f} MB", ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
