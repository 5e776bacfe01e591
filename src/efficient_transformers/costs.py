"""What a config costs at a length, by arithmetic: pairs of its pattern, FLOPs of its matrix products, its memory.

A multiplication and an addition are two FLOPs, as everywhere. Only matrix products count, as in torch's own counter:
softmax, norms and the elementwise product of a token with itself are a few percent, and fast Fourier transforms count
nothing at all. The tests compare both numbers, and the state of a decoder with what its cache holds.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, PreTrainedModel

from .models import sparse_attention as engine
from .models.attention import group_heads
from .models.caching import cache_layer
from .models.configuration import EtConfig
from .models.hashing import bucket_factors
from .models.kernel_attention import KernelConfig
from .models.linear_attention import CHUNK, segment_tokens
from .models.modeling_compressed import EtCompressedConfig
from .models.modeling_fnet import EtFnetConfig
from .models.modeling_full import EtFullConfig
from .models.modeling_gmlp import EtGmlpConfig
from .models.modeling_linformer import EtLinformerConfig
from .models.modeling_mlp_mixer import EtMlpMixerConfig
from .models.modeling_reformer import EtReformerConfig
from .models.modeling_routing import EtRoutingConfig
from .models.modeling_sinkhorn import EtSinkhornConfig
from .models.modeling_synthesizer import PRODUCTS, EtSynthesizerConfig
from .models.patterns import AttentionPattern
from .models.synthetic_attention import query_runs
from .models.tiles import OwnRead, tiles
from .models.triangular import row_chunks


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
    if isinstance(config, EtFnetConfig):
        return 0  # fast transforms are no products of matrices
    if isinstance(config, EtGmlpConfig):
        return config.num_hidden_layers * gmlp_flops(config, length)
    if isinstance(config, EtMlpMixerConfig):
        return config.num_hidden_layers * 4 * length * config.token_mixing_size * config.hidden_size
    if isinstance(config, EtReformerConfig):
        return config.num_hidden_layers * config.num_attention_heads * reformer_flops(config, length)
    if isinstance(config, EtRoutingConfig):
        return config.num_hidden_layers * routing_flops(config, length)
    if isinstance(config, EtSinkhornConfig):
        return config.num_hidden_layers * sinkhorn_flops(config, length)
    if isinstance(config, EtSynthesizerConfig):
        return config.num_hidden_layers * synthesizer_flops(config, length)
    if isinstance(config, EtLinformerConfig):
        return config.num_hidden_layers * linformer_flops(config, length)
    length += getattr(config, "num_external_tokens", 0)
    apart = getattr(config, "has_global_projections", False)
    total = 0
    for layer in range(config.num_hidden_layers):
        if isinstance(config, EtCompressedConfig) and config.kind(layer) == "compressed":
            total += compressed_flops(config, length)
            continue
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
    segment = segment_tokens(config.num_attention_heads * features, torch.device("cpu"))  # on others they are longer
    while left > 0:
        tokens = min(left, segment)
        size = min(CHUNK, tokens)
        chunks = -(-tokens // size)
        inside = 2 * chunks * size * size * (features + dim)
        across = 2 * chunks * features * (2 * size * dim + chunks * (dim + 1))
        total, left = total + inside + across, left - tokens
    return total


def reformer_flops(config: EtReformerConfig, length: int) -> int:
    """Of one head: its hashes, and chunks that read themselves and the one before."""
    rounds, size = 1 if config.is_exact else config.num_hashes, min(config.chunk_length, length)
    factors = config.widest_factors
    if config.num_buckets is None and not config.is_decoder:
        factors = bucket_factors(torch.tensor([length]), config.lsh_chunk_length, config.bucket_limit)[0].tolist()
    columns = sum(factor // 2 for factor in factors)
    return 2 * rounds * config.head_dim * (length * columns + 2 * -(-length // size) * size * 2 * size)


def routing_flops(config: EtRoutingConfig, length: int) -> int:
    """Of all heads of a layer of clusters: windows, groups, and how near each token is to each centroid."""
    local, routing, count = config.num_local_heads, config.num_routing_heads, config.clusters_per_head
    near = local * tile_pairs(config.window, length, local) if local else 0
    if config.is_decoder:  # chunks of neighbours in a cluster, which read the one before them, too
        size, placed = min(config.reach, length), 1
        far = -(-length // size) * size * 2 * size
    else:
        size, placed = min(config.cluster_size or -(-length // count), length), 2
        far = count * size * size
    return 2 * config.head_dim * (2 * near + routing * (2 * far + placed * length * count))


def sinkhorn_flops(config: EtSinkhornConfig, length: int) -> int:
    """Of one layer: the sorting network on its blocks, the mixtures of them, and what queries read of these."""
    hidden, size, heads = config.hidden_size, config.block_size, config.num_attention_heads
    count = -(-length // size)
    rows = count if config.sortcut_blocks is None else min(config.sortcut_blocks, count)
    scores = 4 * count * hidden**2 + count**2 * hidden
    mixtures = 2 * rows * count * size * hidden
    if length % size and not config.is_decoder:  # how much of each sorted token is there
        mixtures += rows * count * size * heads
    keys = 2 * size if config.sortcut_blocks is None else rows * size
    return 2 * (scores + mixtures + 2 * count * size * keys * hidden)


def linformer_flops(config: EtLinformerConfig, length: int) -> int:
    """Of one layer: sums over positions, with the keys and values they are made of, and what queries read of them."""
    hidden, rows = config.hidden_size, config.projected_length
    of_all = config.position_embedding_type == "rotary" or config.projection_sharing == "none"
    matrices = 2 if of_all or config.projection_sharing == "headwise" else 1
    keys_and_values = 2 * (length if of_all else rows) * hidden**2
    counts = 0 if of_all else matrices * rows * length  # what the bias is multiplied by
    return 2 * (matrices * rows * length * hidden + counts + keys_and_values + 2 * length * rows * hidden)


def gmlp_flops(config: EtGmlpConfig, length: int) -> int:
    """Of one layer: what the gate reads, of all positions or of those before, and its tiny attention."""
    entries = length**2
    if config.is_decoder:
        entries = sum((stop - start) * stop for start, stop in row_chunks(length))
    return entries * config.intermediate_size + 4 * length**2 * (config.tiny_attention_size or 0)


def compressed_flops(config: EtCompressedConfig, length: int) -> int:
    """Of one compressed layer: the convolutions, and what queries read of the segments."""
    size, count = config.compression_factor, -(-length // config.compression_factor)
    taps, rows = -(-config.kernel // size) * size, count * size if config.is_decoder else length
    return 2 * 2 * config.hidden_size * count * (taps * config.head_dim + rows)


def synthesizer_flops(config: EtSynthesizerConfig, length: int) -> int:
    """Of one layer: scores, as far as they are products, and what is read by them."""
    dim, heads, kinds = config.head_dim, config.num_attention_heads, config.kinds
    features = sum(config.factor_rank if kind == "factorized_random" else dim for kind in kinds if kind in PRODUCTS)
    if set(kinds) <= set(PRODUCTS):
        return 2 * heads * length**2 * 2 * max(dim, features)
    pairs = sum((q.stop - q.start) * (q.stop if config.is_decoder else length) for q in query_runs(length))
    short = 0
    if "factorized_dense" in kinds:
        short = config.dense_period + -(-config.max_position_embeddings // config.dense_period)
    return 2 * heads * dim * length * short + 2 * heads * pairs * (dim + features)


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
        apart = ".global_" in name or ".sorting_network." in name  # counted in attention_flops
        apart = apart or (isinstance(config, EtLinformerConfig) and name.endswith((".k_proj", ".v_proj")))
        if isinstance(module, torch.nn.Linear) and not apart:
            once = name.endswith("pooler.dense") or (name == "classifier" and getattr(model, "pools", False))
            rows = 1 if once else inner if ".layers." in f".{name}" else length
            total += 2 * rows * module.in_features * module.out_features
    return total


def state_size(config: EtConfig, length: int) -> int:
    """Numbers that a decoder's cache must hold behind `length` tokens, to read them for the next one; batch 1.

    Positions, buckets and the room that a cache keeps to grow into are not counted. Where the span of a pattern is
    finite, a cache forgets in steps, and holds up to a span more between them. Raises ValueError for an encoder.
    """
    if not config.is_decoder:
        raise ValueError(f"is_decoder ({config.is_decoder}) must be True: an encoder keeps nothing between tokens.")
    return sum(layer_state_size(config, layer, length) for layer in range(config.num_hidden_layers))


def layer_state_size(config: EtConfig, layer: int, length: int) -> int:
    size = config.hidden_size
    match config:
        case KernelConfig():
            sums = (
                config.num_attention_heads * config.features_per_head * (config.head_dim + 1 + config.features.in_logs)
            )
            gates = config.num_attention_heads if getattr(config, "gated", False) else 1
            return sums + gates * bool(config.features.floor)
        case EtGmlpConfig():
            return length * (config.intermediate_size // 2 + 2 * (config.tiny_attention_size or 0))
        case EtReformerConfig() | EtRoutingConfig():
            return 2 * length * size
        case EtSynthesizerConfig():
            return length * size * (2 if "vanilla" in config.kinds else 1)
        case EtSinkhornConfig():
            return -(-length // config.block_size) * 2 * size * (config.block_size + 1)
        case EtCompressedConfig() if config.kind(layer) == "compressed":
            factor, reach = config.compression_factor, -(-config.kernel // config.compression_factor)
            return 2 * size * (length // factor + reach * factor)
        case _:
            kept = cache_layer(config.attention_patterns(layer))  # type: ignore[attr-defined]
            rows = length if kept.span is None else min(length, kept.num_prefix + kept.span)
            return 2 * rows * size


def as_decoder(config: EtConfig) -> EtConfig | None:
    """The config as a decoder's, or None where there is none."""
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
    """Markdown: a row for each length with the multiplications of a forward pass and the state of a decoder.

    A multiplication with its addition counts as one. Beside those of the whole bare model and of its mixers stand
    those of full attention in a model of the same sizes. Bytes are of float32. Raises ValueError for a length that
    `max_position_embeddings` has no room for.
    """
    for length in lengths:
        if not 1 <= length <= config.max_position_embeddings:
            raise ValueError(
                f"length ({length}) must lie between 1 and max_position_embeddings "
                f"({config.max_position_embeddings}): set the latter."
            )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    decoder = as_decoder(config)
    heads = "length", "multiplications, M", "of the mixers, M", "of full attention, M", "decoder's state, KB"
    rows: list[Iterable[str]] = [heads, ["---"] * len(heads)]
    same = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "is_decoder"
    full = EtFullConfig(**{name: getattr(config, name) for name in same})
    for length in lengths:
        counts = forward_flops(model, length), attention_flops(config, length), attention_flops(full, length)
        state = "-" if decoder is None else f"{4 * state_size(decoder, length) / 1024:,.1f}"
        rows.append([f"{length:,}", *(f"{count / 2e6:,.1f}" for count in counts), state])
    lines = [f"{parameters:,} parameters, {4 * parameters / 2**20:,.1f} MB", ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
