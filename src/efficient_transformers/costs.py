"""What a config costs at a length, by arithmetic: pairs of its pattern, and FLOPs of its matrix products.

A multiplication and an addition are two FLOPs, as everywhere. Only matrix products count, as in torch's own counter:
softmax, norms and the elementwise product of a token with itself are a few percent. The tests compare both numbers.
"""

import torch
from transformers import PreTrainedModel

from .models import sparse_attention as engine
from .models.attention import group_heads
from .models.configuration import EtConfig
from .models.kernel_attention import KernelConfig
from .models.linear_attention import CHUNK, segment_tokens
from .models.patterns import AttentionPattern
from .models.tiles import OwnRead, tiles


def pairs(pattern: AttentionPattern, length: int) -> int:
    """How many (query, key) pairs one head's pattern has over `length` tokens: the ones in its matrix."""
    window = length if pattern.window is None else pattern.window
    total = 0
    for residue in range(min(pattern.dilation, length)):
        count = -(-(length - residue) // pattern.dilation)  # tokens of this residue class
        reach = min(window, count - 1)
        one_side = count * reach - reach * (reach + 1) // 2
        total += count + one_side * (1 if pattern.causal else 2)
    if not pattern.global_spans(length) and not pattern.num_random_blocks and not pattern.in_blocks:
        return total
    # global tokens and random blocks overlap with the window and each other: count row by row
    position = torch.arange(length)
    return sum(int(pattern.allows(torch.zeros(1, dtype=torch.long), i, position, length).sum()) for i in position)


def tile_pairs(pattern: AttentionPattern, length: int, num_heads: int, global_rows: bool = True) -> int:
    """Pairs per head that the engine multiplies: those of the pattern and the empty corners of its tiles.

    Without the rows of global tokens where the variant computes them apart.
    """
    if engine.is_short(pattern, length, num_heads):
        return length * length
    total = 0
    for tile in tiles(pattern, length, num_heads, torch.float32, torch.device("cpu"), global_rows=global_rows):
        for read in tile.reads:
            if not isinstance(read, OwnRead):
                total += tile.queries.count * tile.queries.width * read.keys.width
    return total


def attention_flops(config: EtConfig, length: int) -> int:
    """Of what stands between the projections and the output, in all layers, for one sequence of `length` tokens."""
    if isinstance(config, KernelConfig):
        return config.num_hidden_layers * config.num_attention_heads * kernel_flops(config, length)
    length += getattr(config, "num_external_tokens", 0)
    apart = getattr(config, "has_global_projections", False)
    total = 0
    for layer in range(config.num_hidden_layers):
        for pattern, heads in group_heads(config.attention_patterns(layer), config.num_attention_heads):  # type: ignore[attr-defined]
            total += 2 * 2 * config.head_dim * len(heads) * tile_pairs(pattern, length, len(heads), not apart)
        if apart:
            total += global_row_flops(config, length)
    return total


def kernel_flops(config: EtConfig, length: int) -> int:
    """Of one head whose attention goes through a feature map: the map, and the sums in the order (VK)Q."""
    assert isinstance(config, KernelConfig)
    dim, features = config.head_dim, config.features_per_head
    rows = features // config.features.per_row if config.features.is_random else 0
    mapped = 2 * 2 * length * rows * dim
    if not config.is_decoder:
        return mapped + 2 * 2 * length * features * dim
    total, left = mapped, length
    segment = segment_tokens(config.num_attention_heads * features)
    while left > 0:
        tokens = min(left, segment)
        size = min(CHUNK, tokens)
        chunks = -(-tokens // size)
        inside = 2 * chunks * size * size * (features + dim)
        across = 2 * chunks * features * (2 * size * dim + chunks * (dim + 1))
        total, left = total + inside + across, left - tokens
    return total


def global_row_flops(config: EtConfig, length: int) -> int:
    """Of the rows of Longformer's own global tokens in one layer, with their projections."""
    size, count = config.hidden_size, min(getattr(config, "num_global_tokens", None) or 0, length)
    if config.folds_global_rows(count):  # type: ignore[attr-defined]
        return 2 * count * size * (3 * size + 2 * config.num_attention_heads * length)
    return 2 * size * (count * size + 2 * length * size + 2 * count * length) * bool(count)


def forward_flops(model: PreTrainedModel, length: int) -> int:
    """Of one forward pass over one sequence of `length` tokens: linear layers and attention."""
    config: EtConfig = model.config  # type: ignore[reportAssignmentType]
    inner = length + getattr(config, "num_external_tokens", 0)
    total = attention_flops(config, length)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".global_" not in name:  # those are in global_row_flops
            once = name.endswith("pooler.dense") or (name == "classifier" and getattr(model, "pools", False))
            rows = 1 if once else inner if ".layers." in f".{name}" else length
            total += 2 * rows * module.in_features * module.out_features
    return total
