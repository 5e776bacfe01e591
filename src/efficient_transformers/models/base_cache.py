"""Caches of causal models, which store no more than later tokens need."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .ops_patterns import AttentionPattern


class SelectableRows:
    """Mixin of the cache layers: what `generate` does with the rows of a batch.

    is_croppable: can the newest tokens be removed again, as assisted decoding does with rejected candidates?
    kept: what is kept instead of the tokens; the reason why a layer is not croppable.
    """

    is_croppable = False
    kept: ClassVar[str]

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 while it is empty."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """Rows of the batch in another order, some of them or several times; nothing while it is empty."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove ({tokens_to_remove}) must be 0: this cache keeps {self.kept}, from which no token "
                "can be removed. Run the model again without the tokens, or copy the cache before they are added."
            )

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs until it is called; of a layer that is croppable only then."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.num_rows).repeat_interleave(repeats))


class SegmentCacheLayer(SelectableRows, CacheLayerMixin):
    """Base of the layers that keep segments of the past instead of its tokens: they count tokens and have no limit."""

    cumulative_length: int  # tokens seen, padding included

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class PatternCacheLayer(SelectableRows, DynamicLayer):
    """Keys and values with their positions, without those that no later query attends to.

    Kept are the first `num_prefix` real tokens and the last `span` ones; `span=None` keeps all. Positions count the
    real tokens of each row and are -1 at padding, so rows may be padded anywhere. Memory does not grow with the
    length where the span is finite; eviction is amortised over `span` steps. Tokens that came after the last eviction
    can be removed again; `activate_past_recording` leaves evictions to `crop`. What grows has room to grow into, so
    that a token is written after the others instead of copying them all.
    """

    AXES: ClassVar[dict[str, int]] = {"keys": 2, "values": 2, "positions": 1}  # the axis of the tokens

    keys: Tensor  # type: ignore[reportIncompatibleVariableOverride] — there from the first update on
    values: Tensor  # type: ignore[reportIncompatibleVariableOverride]
    positions: Tensor

    def __init__(self, num_prefix: int, span: int | None):
        super().__init__()
        self.num_prefix, self.span = num_prefix, span
        self.records_past = False
        self.reset()

    def update(self, key_states: Tensor, value_states: Tensor, positions: Tensor, *args, **kwargs):  # type: ignore[override]
        """Append (b, h, n, d) keys and values at `positions` (b, n); return all there are, with their positions."""
        if self.is_empty:
            self.lazy_initialization(key_states, value_states)
            self.is_empty = False
            self.keys, self.values, self.positions = key_states, value_states, positions
        else:
            self.keys = self.extended("keys", self.keys, key_states, 2)
            self.values = self.extended("values", self.values, value_states, 2)
            self.positions = self.extended("positions", self.positions, positions, 1)
        self.cumulative_length += key_states.shape[2]
        self.removable += key_states.shape[2]
        everything = self.keys, self.values, self.positions
        if not self.records_past:
            self.evict_if_full()
        return everything

    def evict_if_full(self) -> None:
        if self.span is not None and self.positions.shape[1] > self.num_prefix + 2 * self.span:
            self.evict(self.span)
            self.removable = 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.span is None or self.records_past or self.removable == self.cumulative_length

    def activate_past_recording(self) -> None:
        self.records_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -tokens_to_remove of them, or all but that many if it is above 0.

        Raises ValueError where tokens that the window needs then have been evicted.
        """
        # older versions of transformers count the tokens that stay, newer ones those that go
        count = self.cumulative_length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count > self.removable:
            raise ValueError(
                f"{count} tokens must be no more than the {self.removable} that came after the last eviction: this "
                f"cache keeps {self.num_prefix} + {self.span} tokens of each row. Call activate_past_recording() on it "
                "before the tokens are added."
            )
        if count > 0:
            for name, axis in self.AXES.items():
                x: Tensor = getattr(self, name)
                setattr(self, name, x.narrow(axis, 0, x.shape[axis] - count))
            self.cumulative_length -= count
            self.removable -= count
        if not self.is_empty:
            self.evict_if_full()

    def extended(self, name: str, old: Tensor, new: Tensor, axis: int) -> Tensor:
        """`old` and `new`, concatenated along `axis`."""
        if torch.is_grad_enabled() and (old.requires_grad or new.requires_grad):
            return torch.cat([old, new], axis)
        length, total = old.shape[axis], old.shape[axis] + new.shape[axis]
        room = self.room.get(name)
        if room is None or room.data_ptr() != old.data_ptr() or room.shape[axis] < total or is_closed(room):
            shape = list(old.shape)
            shape[axis] = total + total // 4 + 16
            room = self.room[name] = old.new_empty(shape)
            room.narrow(axis, 0, length).copy_(old)
        room.narrow(axis, length, total - length).copy_(new)
        return room.narrow(axis, 0, total)

    def evict(self, span: int) -> None:
        # prefix tokens first, then the newest; padding last
        rank = torch.where((self.positions >= 0) & (self.positions < self.num_prefix), 1 << 60, self.positions)
        kept = rank.argsort(dim=1, descending=True, stable=True)[:, : self.num_prefix + span].sort(dim=1).values
        index = kept[:, None, :, None].expand(-1, *self.keys.shape[1:2], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)
        self.positions = self.positions.gather(1, kept)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: `generate` slices its inputs by it."""
        return self.cumulative_length

    def reset(self) -> None:
        """Release everything: as after `__init__`, in every version of transformers."""
        self.keys = self.values = self.positions = None  # type: ignore[assignment]
        self.is_initialized, self.is_empty = False, True
        self.cumulative_length = self.removable = 0
        self.room: dict[str, Tensor] = {}  # of each tensor: it and the free space after it

    @property
    def num_rows(self) -> int:
        return 0 if self.is_empty else len(self.positions)

    def select(self, rows: Tensor) -> None:
        if not self.is_empty:
            rows = rows.to(self.keys.device)
            self.keys, self.values, self.positions = (
                x.index_select(0, rows) for x in (self.keys, self.values, self.positions)
            )


class BucketCacheLayer(PatternCacheLayer):
    """Keys and values of all tokens, with their positions and with the buckets that the data put them in."""

    AXES: ClassVar[dict[str, int]] = {**PatternCacheLayer.AXES, "buckets": 3}

    buckets: Tensor

    def __init__(self):
        super().__init__(0, None)

    def reset(self) -> None:
        super().reset()
        self.buckets = None  # type: ignore[assignment]

    def update(self, key_states: Tensor, value_states: Tensor, positions: Tensor, buckets: Tensor, *args, **kwargs):  # type: ignore[override]
        """Append (b, h, n, d) keys and values at `positions` (b, n) in `buckets` (b, h, r, n); return all there are."""
        self.buckets = buckets if self.is_empty else self.extended("buckets", self.buckets, buckets, 3)
        return *super().update(key_states, value_states, positions), self.buckets

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if not self.is_empty:
            self.buckets = self.buckets.index_select(0, rows.to(self.buckets.device))


def is_closed(x: Tensor) -> bool:
    """Was `x` made in inference mode, outside of which nothing may be written into it?"""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def cache_layer(patterns: list[AttentionPattern]) -> PatternCacheLayer:
    """The smallest memory that serves all heads of a layer."""
    num_prefix = max(len(pattern.global_tokens) for pattern in patterns)
    if any(pattern.window is None or pattern.num_random_blocks for pattern in patterns):
        return PatternCacheLayer(num_prefix, None)
    # queries at the end of a block need the whole window of blocks, too
    span = max((p.reach or 0) * p.dilation + (p.block_size - 1) * p.in_blocks for p in patterns) + 1
    return PatternCacheLayer(num_prefix, span)


def check_cache(cache: Cache | None, model: str, is_decoder: bool) -> None:
    """Raise ValueError for a cache that this model would ignore, or whose class does more than hold layers.

    Static, quantized, offloaded and encoder-decoder caches promise a layout that the layers of this package do not
    have, so an empty one of these cannot be filled either. Before anything is computed.
    """
    if cache is None:
        return
    if not is_decoder:
        raise ValueError(f"{model} is an encoder and uses no cache: leave past_key_values out, or set is_decoder=True.")
    if type(cache) not in (Cache, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, and {model} makes caches of its own kind: pass None or an "
            "empty DynamicCache, and to generate no cache_implementation."
        )
    if getattr(cache, "offloading", False):
        raise ValueError(f"{model} cannot offload its cache: pass None or a DynamicCache without offloading.")


def prepare_cache(cache: Cache | None, kinds: list[type], new_layers: Callable[[], list]) -> Cache:
    """A cache with the layers this model needs, of these `kinds`; `new_layers` makes them where they are not there yet.

    An empty `DynamicCache` is filled in place: `generate` passes one, and callers keep the object they passed. Raises
    ValueError for a cache that already holds another model's states, or is made of other layers.
    """
    if cache is None:
        return Cache(layers=new_layers())
    if [type(layer) for layer in cache.layers] == kinds:
        return cache
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values ({type(cache).__name__} with {len(cache)} layers) already holds states this model "
            "did not write: pass None, or an empty cache."
        )
    if cache.layers and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values has layers of the class {type(cache.layers[0]).__name__}, and this model needs "
            f"{', '.join(sorted({kind.__name__ for kind in kinds}))}: pass None, or an empty DynamicCache."
        )
    cache.layers[:] = new_layers()
    return cache
