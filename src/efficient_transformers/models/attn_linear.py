r"""Attention through a feature map, in time linear in the length.

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

Katharopoulos et al. 2020 (arXiv:2006.16236), equations 4 to 6. The sums over the keys are a state of fixed size:
`linear_attention` takes it over all keys, `causal_linear_attention` carries it from chunk to chunk, and
`linear_attention_step` from token to token; `attention_matrix` writes out the n×n weights that all three stand for.

Long sequences go by segments, whose features stay in the cache of the processor; those of very long ones are computed
again in the backward pass instead of being kept.

Shapes: q, k, v (b, h, n, d), features (b, h, n, f), padding_mask (b, n), which is True at real tokens. Everything is
computed in float32, or in float64 for float64 inputs, and returned in the dtype of v.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .ops_feature_maps import FeatureMap
from .ops_tracing import count_blocks, is_traced

# By measurement:
CHUNK = 128  # tokens whose weights are written out
SEGMENT_ENTRIES = 2**19  # features of a segment on a CPU
KEPT_ENTRIES = 2**24  # features of a sequence that are kept for the backward pass
# Features of a segment elsewhere. With those of a CPU an H200 took 47 ms for 65,536 tokens of RFA, for the most part to
# launch the products of 128 segments; the other end, memory, is 64 MB for each copy of the features.
LAUNCHED_ENTRIES = 2**24


class LinearState(NamedTuple):
    """What is left of the keys and values so far.

    sums: Σ φ(k) vᵀ, (b, h, f, d). total: Σ φ(k), (b, h, f).
    mass: how many keys that is, less what a gate has left of them, (b, h or 1, 1, 1); of maps with a floor.
    peak: where features come as logarithms, the largest of each so far, (b, h, f); both sums are in units of its exp.
    """

    sums: Tensor
    total: Tensor
    mass: Tensor | None = None
    peak: Tensor | None = None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Every query reads every key that is kept: (b, h, n, d). O(n·f·d) time and O(n·d) memory."""
    q, k, values, padding_mask, _ = prepared(q, k, v, padding_mask)
    (size, run), state = plan(k, feature_map, projection), None
    with torch.autocast(q.device.type, enabled=False):
        for keys, rows, kept in segments(size, k, values, padding_mask):
            state = run(absorb, keys, rows, kept, None, state, feature_map, projection)
        out = [run(read, queries, state, feature_map, projection) for (queries,) in segments(size, q)]
    return join_segments(out).to(v.dtype)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    r"""A query reads `state` and the keys up to its own: (b, h, n, d), and the state behind the last one.

    `log_decay` (b, h, n) is log g of a recency gate: :math:`S_t = g_t S_{t-1} + (1 - g_t)\,\phi(k_t) v_t^\top`, and
    the normaliser likewise (Peng et al. 2021, arXiv:2103.02143, section 3.2). O(n·f·d) time and O(n·d) memory.
    """
    q, k, values, padding_mask, log_decay = prepared(q, k, v, padding_mask, log_decay)
    (size, run), use_fla, out = plan(k, feature_map, projection), fla_takes(q), []
    with torch.autocast(q.device.type, enabled=False):
        for segment in segments(None if use_fla else size, q, k, values, padding_mask, log_decay):
            mixed, state = run(causal_segment, *segment, state, feature_map, projection, use_fla)
            out.append(mixed)
    assert state is not None
    return join_segments(out).to(v.dtype), state


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    padding_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    """`causal_linear_attention` of one token, n = 1, as the recurrence it is. O(f·d), whatever came before."""
    q, k, values, padding_mask, log_decay = prepared(q, k, v, padding_mask, log_decay)
    with torch.autocast(q.device.type, enabled=False):
        if log_decay is not None and state is not None:
            kept = log_decay.exp()
            state = state._replace(sums=state.sums * kept, total=state.total * kept[..., 0])
        state = absorb(k, values, padding_mask, log_decay, state, feature_map, projection)
        return read(q, state, feature_map, projection).to(v.dtype), state


def attention_matrix(
    q: Tensor,
    k: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    padding_mask: Tensor | None = None,
    causal: bool = False,
    log_decay: Tensor | None = None,
) -> Tensor:
    """The weights of all pairs, (b, h, n, n): what the functions above never write out. O(n²·f).

    Rows sum to 1, or less where the map has a floor; those of padding to 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    there = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    there = (there.tril() if causal else there)[None, None]
    if padding_mask is not None:
        there = there & padding_mask[:, None, None, :] & padding_mask[:, None, :, None]
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (feature_map(x.to(wide), projection) for x in (q, k))
        if feature_map.in_logs and padding_mask is not None:
            keys = keys.masked_fill(~padding_mask[:, None, :, None], torch.finfo(wide).min)
        if feature_map.per_feature:
            # the weights of the features of each query, over the sums of the keys that it reads
            queries = queries.log_softmax(-1) - (keys.logcumsumexp(2) if causal else keys.logsumexp(2, keepdim=True))
        if feature_map.in_logs:
            peak = keys.amax(2, keepdim=True)
            queries, keys = queries + peak, (keys - peak).exp()
            scale = 0 if feature_map.per_feature else queries.amax(-1, keepdim=True)
            queries = (queries - scale).exp()
        left = there.to(wide)  # of each key to each query
        if log_decay is not None:
            passed = log_decay.to(wide).cumsum(-1)
            left = left * (passed[..., :, None] - passed[..., None, :]).masked_fill(~there, 0).exp()
            left = left * -torch.expm1(log_decay.to(wide))[..., None, :]
        weights = (queries @ keys.transpose(-1, -2)).masked_fill(~there, 0) * left
        mass = left.sum(-1, keepdim=True) if feature_map.floor else None
        return (
            weights if feature_map.per_feature else divided(weights, weights.sum(-1, keepdim=True), mass, feature_map)
        )


def prepared(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None, log_decay: Tensor | None = None) -> tuple:
    """All in one dtype, and masks and gates with the axes of the features."""
    wide = torch.promote_types(q.dtype, torch.float32)
    padding_mask = None if padding_mask is None else padding_mask[:, None, :, None]
    return (
        q.to(wide),
        k.to(wide),
        v.to(wide),
        padding_mask,
        None if log_decay is None else log_decay.to(wide)[..., None],
    )


def segment_tokens(of_token: int, device: torch.device) -> int:
    """Tokens of a segment, a multiple of the chunk, if each has `of_token` features in all heads of a batch."""
    entries = SEGMENT_ENTRIES if device.type == "cpu" else LAUNCHED_ENTRIES
    return max(1, entries // (of_token * CHUNK)) * CHUNK


def plan(k: Tensor, feature_map: FeatureMap, projection: Tensor | None) -> tuple[int | None, Callable[..., Any]]:
    """Tokens of a segment, None for the whole sequence, and what calls the function of one.

    That is the function itself, or `checkpoint` where there is too much to be kept.
    """

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    if is_traced():
        return None, call
    features = k.shape[-1] if projection is None else projection.shape[-2] * feature_map.per_row
    of_token = k.shape[0] * k.shape[1] * features
    size = segment_tokens(of_token, k.device)
    if torch.is_grad_enabled() and of_token * k.shape[2] > KEPT_ENTRIES:
        return size, partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return size, call


def segments(size: int | None, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors in pieces of `size` along axis 2, split at once: slices would each add a gradient of full length."""
    if size is None or size >= tensors[0].shape[2]:  # type: ignore[union-attr]
        yield tensors
        return
    count = -(-tensors[0].shape[2] // size)  # type: ignore[union-attr]
    yield from zip(*([None] * count if x is None else x.split(size, 2) for x in tensors), strict=True)


def join_segments(parts: list[Tensor]) -> Tensor:
    """Segments (b, h, s, d) as (b, h, n, d), a view of (b, n, h, d): the heads are side by side for what comes next."""
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def key_features(
    k: Tensor,
    padding_mask: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    causal: bool = False,
) -> tuple[Tensor, LinearState | None, Tensor | None]:
    """φ(k), 0 where there is no key, `state` in the same units, and the peak so far.

    A query that does not read the key with the peak must not be left with nothing: if `causal`, no feature is taken for
    less than exp(-43) of the largest one in its segment (exp(-354) in float64).
    """
    features = feature_map(k, projection)
    if not feature_map.in_logs:
        return features if padding_mask is None else features * padding_mask, state, None
    lowest = torch.finfo(features.dtype).min
    seen = features.detach()  # the result does not depend on the peak, so nothing is to be learnt from it
    peak = (seen if padding_mask is None else seen.masked_fill(~padding_mask, lowest)).amax(2)
    if state is not None:
        assert state.peak is not None
        peak = torch.maximum(peak, state.peak)
        unit = (state.peak - peak).exp()
        state = LinearState(state.sums * unit[..., None], state.total * unit, state.mass, peak)
    features = features - peak[:, :, None]
    if causal:
        features = features.clamp(min=math.log(torch.finfo(features.dtype).tiny) / 2)
    return (features if padding_mask is None else features.masked_fill(~padding_mask, lowest)).exp(), state, peak


def query_features(q: Tensor, peak: Tensor | None, feature_map: FeatureMap, projection: Tensor | None) -> Tensor:
    """φ(q); where features come as logarithms their softmax, for a factor of each query's own divides out."""
    features = feature_map(q, projection)
    if not feature_map.in_logs:
        return features
    assert peak is not None
    return (features if feature_map.per_feature else features + peak[:, :, None]).softmax(-1)


def absorb(
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None,
    log_decay: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
) -> LinearState:
    """The state behind some more keys, of which a gate takes the share 1 - g."""
    features, state, peak = key_features(k, padding_mask, state, feature_map, projection)
    if log_decay is not None:
        features = features * -torch.expm1(log_decay)
    sums, total = features.transpose(-1, -2) @ v, features.sum(2)
    mass = masses(k, padding_mask, log_decay, state)[:, :, -1:] if feature_map.floor else None
    if state is not None:
        sums, total = state.sums + sums, state.total + total
    return LinearState(sums, total, mass, peak)


def masses(k: Tensor, padding_mask: Tensor | None, log_decay: Tensor | None, state: LinearState | None) -> Tensor:
    """The `mass` behind every one of these keys, (b, h or 1, n, 1)."""
    before = 0 if state is None or state.mass is None else state.mass
    if log_decay is not None:
        return 1 - log_decay.cumsum(2).exp() * (1 - before)
    real = k.new_ones(k.shape[0], 1, k.shape[2], 1) if padding_mask is None else padding_mask.to(k.dtype)
    return before + real.cumsum(2)


def divided(mixed: Tensor, weight: Tensor, mass: Tensor | None, feature_map: FeatureMap) -> Tensor:
    """Σ w v over Σ w, or over the floor; 0 where there was no key."""
    return mixed / nonzero(weight if mass is None else torch.maximum(weight, feature_map.floor * mass))


def read(q: Tensor, state: LinearState, feature_map: FeatureMap, projection: Tensor | None) -> Tensor:
    """What queries that read all of a state get, (b, h, n, d)."""
    features = query_features(q, state.peak, feature_map, projection)
    if feature_map.per_feature:
        return features @ (state.sums / nonzero(state.total[..., None]))
    return divided(features @ state.sums, dot(features, state.total[:, :, None]), state.mass, feature_map)


def causal_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None,
    log_decay: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    use_fla: bool = False,
) -> tuple[Tensor, LinearState]:
    """`causal_linear_attention` of one segment."""
    keys, state, peak = key_features(k, padding_mask, state, feature_map, projection, causal=True)
    queries = query_features(q, peak, feature_map, projection)
    if feature_map.per_feature:
        total = keys.cumsum(2)
        queries = queries / nonzero(total if state is None else total + state.total[:, :, None])
    products = fla_products if use_fla else chunked_products
    mixed, weight, sums, total = products(queries, keys, v, log_decay, state)
    mass = masses(k, padding_mask, log_decay, state) if feature_map.floor else None
    if not feature_map.per_feature:  # those weights sum to 1 as they are
        mixed = divided(mixed, weight, mass, feature_map)
    return mixed, LinearState(sums, total, None if mass is None else mass[:, :, -1:], peak)


def chunked_products(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: LinearState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ w v (b, h, n, d) and Σ w (b, h, n, 1) over the past, w = q_i·k_j of mapped q and k; sums and total behind it.

    Within a chunk the weights are written out; what came before it is read from a state at its beginning.
    """
    length, size = q.shape[2], CHUNK if is_traced() else min(CHUNK, q.shape[2])
    q, k, v = (padded_chunks(x, size) for x in (q, k, v))  # (b, h, c, size, ·)
    weights = q @ k.transpose(-1, -2)
    earlier = q.new_ones(q.shape[2], q.shape[2])
    if log_decay is None:
        weights, earlier, left = weights.tril_(), earlier.tril(-1), None
    else:
        gates = padded_chunks(log_decay, size)
        taken, passed = -torch.expm1(gates), gates.cumsum(3)  # passed: from the beginning of the chunk
        whole = passed[..., -1, :]  # (b, h, c, 1)
        since = whole.cumsum(2)  # from the beginning of the segment
        weights = weights * (decay_between(passed, passed) * taken.transpose(-1, -2))
        earlier, left = decay_between(since - whole, since, -1), (since - whole).exp()
        k, q = k * (taken * (whole[..., None, :] - passed).exp()), q * passed.exp()
    own, own_total = k.transpose(-1, -2) @ v, k.sum(3)
    before, before_total = (earlier @ own.flatten(-2)).unflatten(-1, own.shape[-2:]), earlier @ own_total
    if state is not None:
        carried, carried_total = state.sums[:, :, None], state.total[:, :, None]
        before = before + (carried if left is None else carried * left[..., None])
        before_total = before_total + (carried_total if left is None else carried_total * left)
    mixed = weights @ v + q @ before
    weight = weights.sum(-1, keepdim=True) + dot(q, before_total[..., None, :])
    sums, total = before[:, :, -1], before_total[:, :, -1]
    if log_decay is not None:
        last = whole[:, :, -1].exp()
        sums, total = sums * last[..., None], total * last
    sums, total = sums + own[:, :, -1], total + own_total[:, :, -1]
    return mixed.flatten(2, 3)[:, :, :length], weight.flatten(2, 3)[:, :, :length], sums, total


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x·y, (…, 1); a product with a single column takes four times as long."""
    return (x * y).sum(-1, keepdim=True)


def decay_between(to: Tensor, since: Tensor, diagonal: int = 0) -> Tensor:
    """exp(to_i - since_j) for j ≤ i + `diagonal` and 0 elsewhere: (…, n, 1) twice -> (…, n, n)."""
    gone = to - since.transpose(-1, -2)
    there = torch.ones(gone.shape[-2:], dtype=torch.bool, device=gone.device).tril(diagonal)
    return gone.masked_fill(~there, -torch.inf).exp()


def padded_chunks(x: Tensor, size: int) -> Tensor:
    """(b, h, n, ·) -> (b, h, c, size, ·), filled up with zeros."""
    length = x.shape[2]
    if is_traced():
        # selected by index, because folding a padded sequence would make a traced length a multiple of the chunk
        index = torch.arange(count_blocks(length, size) * size, device=x.device)
        x = x.index_select(2, index.clamp(max=length - 1)) * (index < length)[:, None]
    elif length % size:
        x = F.pad(x, (0, 0, 0, -length % size))
    return x.unflatten(2, (-1, size)).contiguous()  # once, or every product would copy it


def nonzero(x: Tensor) -> Tensor:
    """x with 1 in the place of 0: of a query that finds no key the sum of the values is 0, too."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1, x)


def fla_takes(q: Tensor) -> bool:
    """Is flash-linear-attention there, and may it run?"""
    return q.is_cuda and q.dtype == torch.float32 and not is_traced() and fla() is not None


@lru_cache(maxsize=1)
def fla() -> Any:
    """The module with the kernels of flash-linear-attention, or None."""
    try:
        return import_module("fla.ops.simple_gla")
    except ImportError:
        return None


def fla_products(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: LinearState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunked_products` by flash-linear-attention: layout (b, n, h, ·), and the total as a column of ones."""
    values, gate, before = F.pad(v, (0, 1), value=1.0), None, None
    if log_decay is not None:
        values, gate = values * -torch.expm1(log_decay), log_decay.squeeze(-1).transpose(1, 2).contiguous()
    if state is not None:
        before = torch.cat([state.sums, state.total[..., None]], -1)
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, values))
    out, sums = fla().chunk_simple_gla(*rows, g=gate, scale=1.0, initial_state=before, output_final_state=True)
    out = out.transpose(1, 2)
    return out[..., :-1], out[..., -1:], sums[..., :-1], sums[..., -1]
