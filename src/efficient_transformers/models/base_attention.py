"""Multi-head attention over drawn patterns: projections, rotary positions, cache, and the choice of the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .attn_dense import softmax_attention
from .attn_pattern_blocked import blocked_attention
from .attn_pattern_flex import flex_sparse_attention
from .attn_pattern_tiled import biased_attention, by_rows, is_short, mask_size, sparse_attention
from .base_cache import PatternCacheLayer, cache_layer
from .base_packing import Group
from .ops_patterns import AttentionPattern, times_drawn
from .ops_tiles import as_bias
from .ops_tracing import count_blocks, is_exported, is_traced


@dataclass
class SequenceInfo:
    """What a mixer may know about a batch besides its hidden states. Rows are packed: real tokens first.

    positions: index of each real token in its row, -1 at padding, (b, n).
    keep: True at real tokens, (b, n); None where all are.
    lengths: real tokens per row as numbers; None where all are, and in traced code.
    global_mask: True at tokens the caller marked as global, (b, n); None where there are none.
    global_tokens: the same as positions per row; None as `lengths`.
    rotary: cos and sin of the angles, (b, n, 1, d/2) each.
    cache: of a causal model; holds everything before these tokens.
    shared: a module of the model whose weights all its mixers use; None if there is none.
    decisions: what mixers have chosen by the data, by layer. A layer that runs a second time, to be differentiated,
        finds them: rounding must not send a token elsewhere than the first time.
    """

    positions: Tensor
    keep: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    global_mask: Tensor | None = None
    global_tokens: tuple[tuple[int, ...], ...] | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    output_attentions: bool = False
    shared: nn.Module | None = None
    block_masks: dict = field(default_factory=dict)  # FlexAttention's, made once for all layers
    decisions: dict[int, Any] = field(default_factory=dict)

    def decide(self, layer: int, choose: Callable[[], Any]) -> Any:
        """What `choose` gives, or gave when `layer` asked first. It has no gradient."""
        if layer not in self.decisions:
            with torch.no_grad():
                self.decisions[layer] = choose()
        return self.decisions[layer]

    def mix(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `mixer` makes of `hidden` (b, n, e), and its weights if it gives any."""
        return mixer(hidden, self)

    @property
    def parts(self) -> "list[SequenceInfo]":
        """What the mixer was told in each of its calls."""
        return [self]


@dataclass
class PackedDocuments(SequenceInfo):
    """Documents of packed rows: one row of all their tokens, (1, t, e), of which a mixer gets one group at a time.

    Groups and not one batch, so that a long document does not make all others as long. Of a block nothing else runs
    more than once: processes whose groups are not as many still meet in every block, as sharded parameters must.

    groups: documents of about one length, and what is known of them. places: of the row's tokens in the flattened
        groups, one behind the other, (t,).
    """

    groups: list[tuple[Group, SequenceInfo]] = field(default_factory=list)
    places: Tensor = field(default_factory=Tensor)

    def mix(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, None]:
        mixed = [sequence.mix(mixer, group.gather(hidden[0]))[0].flatten(0, 1) for group, sequence in self.groups]
        return torch.cat(mixed).index_select(0, self.places)[None], None

    @property
    def parts(self) -> list[SequenceInfo]:
        return [sequence for _, sequence in self.groups]


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""cos and sin of :math:`m\,\theta^{-2i/d}` for positions m, each (b, n, 1, d/2).

    Su et al. 2021 (arXiv:2104.09864), section 3.4.2. Computed in float32 or wider, returned in `dtype`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions[..., None, None].to(wide) * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn feature pairs (i, i + d/2) of `x` (b, n, h, d); the paper pairs (2i, 2i+1), a permutation of the same."""
    cos, sin = (angle.to(x.dtype) for angle in rotary)  # under autocast `x` is narrower than the embeddings
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def no_rows(hidden: Tensor, *layers: nn.Module) -> Tensor | float:
    """Zero, computed by `layers` from no rows of `hidden` (…, n, e).

    Added to what is computed without these layers, it gives their parameters a gradient of zero: DDP
    waits for a gradient of every parameter in every step, and another process may use the layers.
    """
    if not torch.is_grad_enabled():
        return 0.0
    empty = hidden[..., :0, :]
    return torch.stack([layer(empty).sum() for layer in layers]).sum()


class OwnValues(nn.Module):
    """A module that knows how its own parameters and buffers begin, and which of their axes are positions.

    position_axes: of parameters and buffers of this module, by name, the axes that grow with the longest input;
        `resize_positions` stretches them.
    summed_axes: those of them that the module sums over, of which the entries get smaller as they become more.
    """

    position_axes: ClassVar[dict[str, tuple[int, ...]]] = {}
    summed_axes: ClassVar[dict[str, tuple[int, ...]]] = {}

    def init_own(self) -> None:
        """Give the parameters and buffers of this module itself their values, by transformers' `initialization`."""

    @property
    def learns(self) -> bool:
        """Are all parameters of this module trained? Only then may its buffers follow the data.

        An adapter is saved without the buffers of its base, whose parameters are frozen: those must be what they were
        in the base's checkpoint. A copy that PEFT trains as a whole (`modules_to_save`) is saved with its buffers.
        """
        return all(parameter.requires_grad for parameter in self.parameters())

    def register_drawn(self, name: str, values: Tensor) -> None:
        """A buffer of values that were drawn on the CPU, where the module is being made."""
        self.register_buffer(name, values.to(torch.get_default_device()))

    def resized(self) -> None:
        """Called when the longest input has changed, for whatever else depends on it than `position_axes`."""


class Mixer(OwnValues):
    """What stands in the place of attention: forward(hidden, sequence) -> hidden and, if there are any, weights."""

    is_whole_block: ClassVar[bool] = False  # does no MLP stand behind it?
    cache_class: type[CacheLayerMixin]  # of what `new_cache_layer` gives

    @classmethod
    def new_shared(cls, config) -> OwnValues | None:
        """A module with weights that the mixers of all layers use: the model owns it, `SequenceInfo` hands it on."""
        return None

    def new_cache_layer(self) -> CacheLayerMixin:
        """What this layer has to remember of the tokens before, empty."""
        raise NotImplementedError

    def count_pass(self) -> None:
        """Called in front of every forward pass in training, outside of what gradient checkpointing repeats."""

    def finish_pass(self, sequence: SequenceInfo) -> None:
        """Called behind every forward pass in training; `decisions` of `sequence.parts` hold what the layer chose."""


class MultiHeadAttention(Mixer):
    """Projections of queries, keys, values and output; what the heads do between them is a subclass's `attend`."""

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
        """What each head has read, (b, h, n, d), and the weights."""
        raise NotImplementedError

    def split_heads(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(b, n, e) -> (b, h, n, d), turned by the rotary angles if there are any."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if rotary is None else rotate(x, rotary)).transpose(1, 2)


class PatternAttention(MultiHeadAttention):
    """Softmax attention whose heads read by `config.attention_patterns(layer)`.

    `attn_implementation` decides how: `eager` writes the matrix out, `sdpa` is the engine, `flex_attention` the
    block-sparse kernel. Heads with the same pattern run together.

    random_blocks: (h, blocks, r) blocks that take the place of the patterns' draw, a buffer of the variants that store
        them; None draws.
    global_rows: are the rows of global tokens computed as all others? False leaves them to the variant.
    """

    cache_class = PatternCacheLayer
    random_blocks: Tensor | None
    global_rows: bool = True

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.register_buffer("random_blocks", None)
        self.dropout = config.attention_probs_dropout_prob
        self.groups = group_heads(config.attention_patterns(layer), self.num_heads)

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
        if sequence.output_attentions or self.config._attn_implementation == "eager":
            return softmax_attention(q, k, v, self.allowed(sequence, sequence.positions), dropout)
        return self.mix(q, k, v, sequence, dropout), None

    @property
    def uses_kernel(self) -> bool:
        """Return True if FlexAttention runs; an exported graph holds plain products instead, for any runtime."""
        return self.config._attn_implementation == "flex_attention" and not is_exported()

    def takes_marks(self, pattern: AttentionPattern) -> bool:
        """Do the tokens that the caller marked become global in heads with this pattern?"""
        return True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo, dropout: float) -> Tensor:
        """All heads through the engine that suits the place, (b, h, n, d)."""
        mixed, keep, table = [], sequence.keep, self.random_blocks
        length, traced = q.shape[2], is_traced() or q.device.type != "cpu"
        if len(self.groups) > 1 and sequence.global_mask is None and not traced and table is None:
            rows = sequence.lengths or (length,) * len(q)
            if all(is_short(pattern, real, len(heads)) for real in set(rows) for pattern, heads in self.groups):
                return by_rows(partial(self.mix_together, dropout=dropout), q, k, v, rows)
        for pattern, heads in self.groups:
            some = slice(None) if len(heads) == self.num_heads else as_slice(heads)
            part = q[:, some], k[:, some], v[:, some]
            blocks = table[some] if table is not None and pattern.num_random_blocks else None
            marked, tokens = sequence.global_mask, sequence.global_tokens
            if not self.takes_marks(pattern):
                marked = tokens = None
            if self.uses_kernel and not dropout and blocks is None:
                out = flex_sparse_attention(*part, pattern, keep, marked, sequence.block_masks)
            elif traced:
                out = blocked_attention(*part, pattern, keep, marked, dropout, blocks, self.global_rows)
            else:
                out = sparse_attention(*part, pattern, sequence.lengths, tokens, dropout, blocks, self.global_rows)
            mixed.append(out)
        return in_order(self.groups, mixed)

    def mix_together(self, q: Tensor, k: Tensor, v: Tensor, length: int, dropout: float) -> Tensor:
        """One dense product for all heads, instead of one for each kind; all rows have `length` real tokens."""
        size = mask_size(length, *(pattern for pattern, _ in self.groups))
        return biased_attention(q, k, v, length, bias_of_heads(self.groups, size, q.dtype), dropout)

    def allowed(self, sequence: SequenceInfo, key_positions: Tensor) -> Tensor:
        """The dense mask of all heads, (b, h or 1, n, m), from the positions of queries and keys.

        Bool, or int64 where stored random blocks may give a query a key several times.
        """
        i, j = sequence.positions[:, None, :, None], key_positions[:, None, None, :]
        lengths = (j.flatten(1).amax(1) + 1).clamp(min=1)  # real tokens of each row
        masks = []
        for pattern, heads in self.groups:
            table = self.random_blocks if pattern.num_random_blocks else None
            drawn = replace(pattern, num_random_blocks=0) if table is not None else pattern
            head = torch.arange(len(heads) if pattern.num_random_blocks else 1, device=i.device)[:, None, None]
            if drawn.num_random_blocks:  # as many for each row as its own length has
                size, row = drawn.block_size, torch.arange(i.shape[0], device=i.device)[:, None, None, None]
                count = count_blocks(j.shape[-1] if is_traced() else int(lengths.max()), size)
                blocks = drawn.random_blocks(len(heads), count, (lengths + size - 1) // size).flatten(0, 1)
                allowed = drawn.allows(row * len(heads) + head, i, j, lengths[:, None, None, None], blocks)
            else:
                allowed = drawn.allows(head, i, j, lengths[:, None, None, None])
            if sequence.global_mask is not None and self.takes_marks(pattern):
                allowed = allowed | sequence.global_mask[:, None, :, None] | sequence.global_mask[:, None, None, :]
            if table is not None:  # global tokens read everything once
                times = times_drawn(table[list(heads)].to(i.device), head, i, j, pattern.block_size)
                allowed = allowed + times * ~pattern.is_global(i, lengths[:, None, None, None])
            masks.append(allowed if len(self.groups) == 1 else allowed.expand(-1, len(heads), -1, -1))
        mask = in_order(self.groups, masks)
        return mask * ((i >= 0) & (j >= 0))


Groups = tuple[tuple[AttentionPattern, tuple[int, ...]], ...]


def group_heads(patterns: Sequence[AttentionPattern], num_heads: int) -> Groups:
    """Heads by pattern, in order of first appearance; `patterns` are tiled over the heads."""
    groups: dict[AttentionPattern, tuple[int, ...]] = {}
    for head in range(num_heads):
        pattern = patterns[head % len(patterns)]
        groups[pattern] = (*groups.get(pattern, ()), head)
    return tuple(groups.items())


def in_order(groups: Groups, parts: list[Tensor]) -> Tensor:
    """Tensors of the groups, (b, heads of the group, …), as one in the order of the heads."""
    if len(parts) == 1:
        return parts[0]
    order = [head for _, heads in groups for head in heads]
    together = torch.cat(parts, 1)
    if order == sorted(order):
        return together
    return together.index_select(1, torch.tensor(order, device=together.device).argsort())


@lru_cache(maxsize=16)
def bias_of_heads(groups: Groups, length: int, dtype: torch.dtype) -> Tensor:
    """0 where a head reads and -inf elsewhere, (1, h, n, n); n is short here."""
    return as_bias(in_order(groups, [pattern.dense(length, len(heads))[None] for pattern, heads in groups]), dtype)


def as_slice(heads: tuple[int, ...]) -> slice | list[int]:
    """Neighbouring heads as a slice, which is a view."""
    return slice(heads[0], heads[-1] + 1) if heads[-1] - heads[0] == len(heads) - 1 else list(heads)
