"""Multi-head attention: projections, rotary positions and cache, for fixed patterns or another attention function."""

import torch
from torch import Tensor, nn

from .attn_dense import softmax_attention
from .attn_pattern import as_slice, dense_mask, fits_one_product, group_heads, in_order, one_product, pattern_attention
from .base_cache import PatternCacheLayer, cache_layer
from .base_mixer import Mixer, SequenceInfo
from .ops_engine import BatchRows, Engine, choose_engine
from .ops_patterns import FULL, AttentionPattern
from .ops_rotary import rotate
from .ops_tracing import is_traced


class MultiHeadAttention(Mixer):
    """Projections of queries, keys, values and output; subclasses define in `attend` what the heads do between them."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """(b, n, e) -> (b, n, e) and, if asked for, the weights (b, h, n, m)."""
        mixed, weights = self.attend(hidden, sequence)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights."""
        raise NotImplementedError

    def split_heads(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(b, n, e) -> (b, h, n, d), turned by the rotary angles if there are any."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if rotary is None else rotate(x, rotary)).transpose(1, 2)

    def engine(self, hidden: Tensor, sequence: SequenceInfo) -> Engine:
        """The engine for a whole sequence; a few tokens after a cache are always dense."""
        return choose_engine(hidden.device, self.config._attn_implementation, sequence.output_attentions)


class PatternAttention(MultiHeadAttention):
    """Softmax attention whose heads follow `config.attention_patterns(layer)`; heads with one pattern run together.

    random_blocks: (h, blocks, r) blocks that replace the patterns' draw, a buffer of the variants that store them; None
        draws.
    global_rows: are the rows of global tokens computed as all others? False leaves them to the variant.
    first_interval: places up to which a row has full attention, with external tokens; None without anchors.
    """

    cache_class = PatternCacheLayer
    random_blocks: Tensor | None
    global_rows: bool = True

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.register_buffer("random_blocks", None)
        self.dropout = config.attention_probs_dropout_prob
        self.groups = group_heads(config.attention_patterns(layer), self.num_heads)
        self.first_interval = config.first_interval

    def new_cache_layer(self) -> PatternCacheLayer:
        return cache_layer(self.config.attention_patterns(self.layer))

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        q = self.split_heads(self.q_proj(hidden), sequence.rotary)
        k, v = self.split_heads(self.k_proj(hidden), sequence.rotary), self.split_heads(self.v_proj(hidden))
        dropout = self.dropout if self.training else 0.0

        positions, seen = sequence.positions, 0
        if sequence.cache is not None:
            seen = sequence.cache.get_seq_length(self.layer)
            memory: PatternCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            keys, values, positions = memory.update(k, v, sequence.positions)
        if seen:  # a few new tokens against what is left of the past: dense, but no longer than the cache is
            return softmax_attention(q, keys, values, self.allowed(sequence, positions), dropout)
        if self.engine(hidden, sequence) == "dense":
            return softmax_attention(q, k, v, self.allowed(sequence, sequence.positions), dropout)
        return self.mix(q, k, v, sequence, dropout), None

    def takes_global_mask(self, pattern: AttentionPattern) -> bool:
        """Do the tokens that the caller marked become global in heads with this pattern?"""
        return True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo, dropout: float) -> Tensor:
        """All heads, (b, h, n, d): by their patterns, and rows that fit into one anchor interval by full attention."""
        first, lengths = self.first_interval, sequence.lengths or q.shape[2:3]
        if first is None or (not is_traced() and min(lengths) > first):
            return self.mix_patterns(q, k, v, sequence, dropout)
        # by index and not by slices, so that an exported graph serves rows shorter and longer than an interval
        length, place = q.shape[2], torch.arange(first, device=q.device)
        index = place.clamp(max=length - 1)
        real = (sequence.positions >= 0).index_select(1, index) & (place < length)
        first_q, first_k, first_v = (x.index_select(2, index) for x in (q, k, v))
        near = pattern_attention(first_q, first_k, first_v, FULL, BatchRows.of(real), dropout)
        near = near.index_select(2, torch.arange(length, device=q.device).clamp(max=first - 1))
        if not is_traced() and max(lengths) <= first:
            return near * (sequence.positions >= 0)[:, None, :, None]
        return torch.where(self.is_short(sequence), near, self.mix_patterns(q, k, v, sequence, dropout))

    def is_short(self, sequence: SequenceInfo) -> Tensor:
        """Does a row fit into one anchor interval? (b, 1, 1, 1)"""
        assert self.first_interval is not None
        return ((sequence.positions >= 0).sum(1) <= self.first_interval)[:, None, None, None]

    def mix_patterns(self, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo, dropout: float) -> Tensor:
        """All heads, by pattern, (b, h, n, d)."""
        table, mixed = self.random_blocks, []
        if table is None and fits_one_product(self.groups, q, sequence):
            return one_product(q, k, v, self.groups, sequence, dropout)
        for pattern, heads in self.groups:
            some = slice(None) if len(heads) == self.num_heads else as_slice(heads)
            rows = sequence if self.takes_global_mask(pattern) else sequence.without_global_mask()
            blocks = table[some] if table is not None and pattern.num_random_blocks else None
            how = rows, dropout, blocks, self.global_rows, self.config._attn_implementation
            mixed.append(pattern_attention(q[:, some], k[:, some], v[:, some], pattern, *how))
        return in_order(self.groups, mixed)

    def allowed(self, sequence: SequenceInfo, key_positions: Tensor) -> Tensor:
        """The dense mask of all heads, (b, h or 1, n, m), from the positions of queries and keys; as `dense_mask`."""
        masks = []
        for pattern, heads in self.groups:
            table = self.random_blocks[list(heads)] if self.random_blocks is not None else None
            table = table if pattern.num_random_blocks else None
            global_mask = sequence.global_mask if self.takes_global_mask(pattern) else None
            mask = dense_mask(pattern, len(heads), sequence.positions, key_positions, global_mask, table)
            masks.append(mask if len(self.groups) == 1 else mask.expand(-1, len(heads), -1, -1))
        real = (sequence.positions >= 0)[:, None, :, None] & (key_positions >= 0)[:, None, None, :]
        allowed = in_order(self.groups, masks)
        if self.first_interval is not None:
            allowed = torch.where(self.is_short(sequence), torch.ones_like(allowed), allowed)
        return allowed * real
