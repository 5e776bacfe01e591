"""FLOPs and decoder state of each token mixer. Every row of `registry.VARIANTS` refers to two of these functions.

`…_flops(config, length)` counts everything between the projections and the output in all layers, for one sequence of
`length` tokens. A multiplication and an addition are two FLOPs. Only matrix products count, as in torch's own counter:
softmax, norms and elementwise products are a few percent. Linear layers that a row lists in `linears_in_flops` are
included.

`…_state(config, layer, length)` counts the values that the cache of one layer must hold after `length` tokens, at batch
size 1. Positions, buckets and spare capacity are not counted.

The tests compare both with torch's counter and with the caches of real models.
"""

from collections.abc import Callable
from typing import Any

import torch

from .models import attn_pattern_tiled as engine
from .models.attn_linear import CHUNK, segment_tokens
from .models.attn_pattern import group_heads
from .models.attn_synthesizer import query_runs
from .models.base_cache import cache_layer
from .models.base_configuration import EtConfig
from .models.modeling_compressed import EtCompressedConfig
from .models.modeling_gmlp import EtGmlpConfig
from .models.modeling_linformer import EtLinformerConfig
from .models.modeling_longformer import EtLongformerConfig
from .models.modeling_mlp_mixer import EtMlpMixerConfig
from .models.modeling_reformer import EtReformerConfig
from .models.modeling_routing import EtRoutingConfig
from .models.modeling_sinkhorn import EtSinkhornConfig
from .models.modeling_synthesizer import PRODUCTS, EtSynthesizerConfig
from .models.ops_lsh import bucket_factors
from .models.ops_patterns import FULL, AttentionPattern
from .models.ops_tile_types import OwnRead
from .models.ops_tiles import tiles
from .models.ops_tril_matmul import row_chunks

Flops = Callable[[Any, int], int]
State = Callable[[Any, int, int], int]


def no_flops(config: EtConfig, length: int) -> int:
    """Zero: for mixers without matrix products, such as a fast Fourier transform."""
    return 0


def keys_and_values(config: EtConfig, layer: int, length: int) -> int:
    """State of a layer that caches the keys and values of all tokens."""
    return 2 * length * config.hidden_size


# patterns -------------------------------------------------------------------------------------------------------------


def tile_pairs(pattern: AttentionPattern, length: int, num_heads: int, global_rows: bool = True) -> int:
    """Query-key pairs per head that the engine multiplies: those of the pattern and the empty corners of its tiles.

    `global_rows=False` omits the rows of global tokens, for variants that compute them separately.
    """
    if engine.is_short(pattern, length, num_heads):
        return length * length
    total = 0
    for tile in tiles(pattern, length, num_heads, torch.float32, torch.device("cpu"), global_rows=global_rows):
        for read in tile.reads:
            if not isinstance(read, OwnRead):
                total += tile.queries.count * tile.queries.width * read.keys.width
    return total


def pattern_layer_flops(config: Any, layer: int, length: int, global_rows: bool = True) -> int:
    """FLOPs of one layer for a row of `length` places."""
    first = config.first_interval
    patterns = [FULL] if first is not None and length <= first else config.attention_patterns(layer)
    groups = group_heads(patterns, config.num_attention_heads)
    pairs = sum(len(heads) * tile_pairs(pattern, length, len(heads), global_rows) for pattern, heads in groups)
    return 2 * 2 * config.head_dim * pairs


def pattern_flops(config: Any, length: int) -> int:
    """Scores and weighted values for the pairs in the tiles."""
    inner = config.row_length(length)
    return sum(pattern_layer_flops(config, layer, inner) for layer in range(config.num_hidden_layers))


def pattern_state(config: Any, layer: int, length: int) -> int:
    """Keys and values within the span of the patterns.

    A cache drops tokens in steps and holds up to one span more between two steps.
    """
    kept = cache_layer(config.attention_patterns(layer))
    rows = length if kept.span is None else min(length, kept.num_prefix + kept.span)
    return keys_and_values(config, layer, rows)


def longformer_flops(config: EtLongformerConfig, length: int) -> int:
    """The pattern, and the rows of global tokens with their separate projections if there are any."""
    if not config.has_global_projections:
        return pattern_flops(config, length)
    length = config.row_length(length)
    size, count = config.hidden_size, min(config.num_global_tokens or 0, length)
    if config.folds_global_rows(count):
        rows = 2 * count * size * (3 * size + 2 * config.num_attention_heads * length)
    else:
        rows = 2 * size * (count * size + 2 * length * size + 2 * count * length) * bool(count)
    layers = range(config.num_hidden_layers)
    return sum(pattern_layer_flops(config, layer, length, global_rows=False) + rows for layer in layers)


# patterns that depend on the data ------------------------------------------------------------------------------------


def reformer_flops(config: EtReformerConfig, length: int) -> int:
    """The hashes, and the attention of chunks to themselves and the previous chunk."""
    rounds, size = 1 if config.is_exact else config.num_hashes, min(config.chunk_length, length)
    factors = config.widest_factors
    if config.num_buckets is None and not config.is_decoder:
        factors = bucket_factors(torch.tensor([length]), config.lsh_chunk_length, config.bucket_limit)[0].tolist()
    columns = sum(factor // 2 for factor in factors)
    of_head = 2 * rounds * config.head_dim * (length * columns + 2 * -(-length // size) * size * 2 * size)
    return config.num_hidden_layers * config.num_attention_heads * of_head


def routing_flops(config: EtRoutingConfig, length: int) -> int:
    """The windows of local heads, the clusters of routing heads, and the products of tokens and centroids."""
    local, routing, count = config.num_local_heads, config.num_routing_heads, config.clusters_per_head
    near = local * tile_pairs(config.window, length, local) if local else 0
    if config.is_decoder:  # chunks of neighbours in a cluster, which also attend to the previous chunk
        size, placed = min(config.reach, length), 1
        far = -(-length // size) * size * 2 * size
    else:
        size, placed = min(config.cluster_size or -(-length // count), length), 2
        far = count * size * size
    of_layer = 2 * config.head_dim * (2 * near + routing * (2 * far + placed * length * count))
    return config.num_hidden_layers * of_layer


def sinkhorn_flops(config: EtSinkhornConfig, length: int) -> int:
    """The sorting network on the blocks, the mixtures of blocks, and the attention to them."""
    hidden, size, heads = config.hidden_size, config.block_size, config.num_attention_heads
    count = -(-length // size)
    rows = count if config.sortcut_blocks is None else min(config.sortcut_blocks, count)
    scores = 4 * count * hidden**2 + count**2 * hidden
    mixtures = 2 * rows * count * size * hidden
    if length % size and not config.is_decoder:  # the fraction of each sorted token that is not padding
        mixtures += rows * count * size * heads
    keys = 2 * size if config.sortcut_blocks is None else rows * size
    return config.num_hidden_layers * 2 * (scores + mixtures + 2 * count * size * keys * hidden)


def sinkhorn_state(config: EtSinkhornConfig, layer: int, length: int) -> int:
    """Keys and values of all blocks, and the two vectors from which the sorting scores of a block are computed."""
    return -(-length // config.block_size) * 2 * config.hidden_size * (config.block_size + 1)


# fewer keys -----------------------------------------------------------------------------------------------------------


def linformer_flops(config: EtLinformerConfig, length: int) -> int:
    """The sums over positions, the keys and values they consist of, and the attention to them."""
    hidden, rows = config.hidden_size, config.projected_length
    of_all = config.position_embedding_type == "rotary" or config.projection_sharing == "none"
    matrices = 2 if of_all or config.projection_sharing == "headwise" else 1
    projected = 2 * (length if of_all else rows + 1) * hidden**2  # a row of zeros gives the bias
    counts = 0 if of_all else matrices * rows * length  # the factors of the bias
    of_layer = matrices * rows * length * hidden + counts + projected + 2 * length * rows * hidden
    return config.num_hidden_layers * 2 * of_layer


def compressed_flops(config: EtCompressedConfig, length: int) -> int:
    """The tiles of local layers; the convolutions of compressed layers and the attention to their segments."""
    size, count = config.compression_factor, -(-length // config.compression_factor)
    taps, rows = -(-config.kernel // size) * size, count * size if config.is_decoder else length
    compressed = 2 * 2 * config.hidden_size * count * (taps * config.head_dim + rows)
    return sum(
        compressed if config.kind(layer) == "compressed" else pattern_layer_flops(config, layer, length)
        for layer in range(config.num_hidden_layers)
    )


def compressed_state(config: EtCompressedConfig, layer: int, length: int) -> int:
    """Keys and values of the segments and of the tokens under the next kernel, or of the block in a local layer."""
    if config.kind(layer) != "compressed":
        return pattern_state(config, layer, length)
    factor, reach = config.compression_factor, -(-config.kernel // config.compression_factor)
    return keys_and_values(config, layer, length // factor + reach * factor)


# feature maps ---------------------------------------------------------------------------------------------------------


def kernel_flops(config: Any, length: int) -> int:
    """The feature map, and the sums in the order Q(φ(K)ᵀV); for a decoder also the weights within its chunks."""
    dim, features = config.head_dim, config.features_per_head
    rows = features // config.features.per_row if config.features.is_random else 0
    of_head = 2 * 2 * length * rows * dim
    if config.is_decoder:
        of_head += causal_sums_flops(config, length)
    else:
        of_head += 2 * 2 * length * features * dim
    return config.num_hidden_layers * config.num_attention_heads * of_head


def causal_sums_flops(config: Any, length: int) -> int:
    """The sums of one causal head, computed over segments of chunks."""
    dim, features = config.head_dim, config.features_per_head
    total, left = 0, length
    segment = segment_tokens(config.num_attention_heads * features, torch.device("cpu"))  # longer on other devices
    while left > 0:
        tokens = min(left, segment)
        size = min(CHUNK, tokens)
        chunks = -(-tokens // size)
        inside = 2 * chunks * size * size * (features + dim)
        across = 2 * chunks * features * (2 * size * dim + chunks * (dim + 1))
        total, left = total + inside + across, left - tokens
    return total


def kernel_state(config: Any, layer: int, length: int) -> int:
    """The sums of keys and values, whose size does not depend on the length."""
    sums = config.num_attention_heads * config.features_per_head * (config.head_dim + 1 + config.features.in_logs)
    gates = config.num_attention_heads if getattr(config, "gated", False) else 1
    return sums + gates * bool(config.features.floor)


# mixing without comparing tokens --------------------------------------------------------------------------------------


def synthesizer_flops(config: EtSynthesizerConfig, length: int) -> int:
    """The scores, if they are matrix products, and the weighted values."""
    dim, heads, kinds = config.head_dim, config.num_attention_heads, config.kinds
    features = sum(config.factor_rank if kind == "factorized_random" else dim for kind in kinds if kind in PRODUCTS)
    if set(kinds) <= set(PRODUCTS):
        return config.num_hidden_layers * 2 * heads * length**2 * 2 * max(dim, features)
    pairs = sum((q.stop - q.start) * (q.stop if config.is_decoder else length) for q in query_runs(length))
    short = 0
    if "factorized_dense" in kinds:
        short = config.dense_period + -(-config.max_position_embeddings // config.dense_period)
    of_layer = 2 * heads * dim * length * short + 2 * heads * pairs * (dim + features)
    return config.num_hidden_layers * of_layer


def synthesizer_state(config: EtSynthesizerConfig, layer: int, length: int) -> int:
    """The values of all tokens and, for the vanilla mixer, their keys."""
    return length * config.hidden_size * (2 if "vanilla" in config.kinds else 1)


def gmlp_flops(config: EtGmlpConfig, length: int) -> int:
    """FLOPs of the spatial gate, over all positions or only earlier ones, and of its tiny attention."""
    entries = length**2
    if config.is_decoder:
        entries = sum((stop - start) * stop for start, stop in row_chunks(length))
    of_layer = entries * config.intermediate_size + 4 * length**2 * (config.tiny_attention_size or 0)
    return config.num_hidden_layers * of_layer


def gmlp_state(config: EtGmlpConfig, layer: int, length: int) -> int:
    """The gated half of the features of all tokens, and the keys and values of the tiny attention."""
    return length * (config.intermediate_size // 2 + 2 * (config.tiny_attention_size or 0))


def mlp_mixer_flops(config: EtMlpMixerConfig, length: int) -> int:
    """The two products of the MLP over the positions."""
    return config.num_hidden_layers * 4 * length * config.token_mixing_size * config.hidden_size
