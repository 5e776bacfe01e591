r"""Attention through a feature map, in time linear in the length.

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

Katharopoulos et al. 2020 (arXiv:2006.16236), equations 4 to 6. The sums over the keys are a state of fixed size:
`linear_attention` takes it over all keys, `causal_linear_attention` carries it from chunk to chunk, and
`linear_attention_step` from token to token; `attention_matrix` writes out the n×n weights that all three imply.

Long sequences are processed in segments whose features fit into the cache of the processor. Features of very long
sequences are recomputed in the backward pass instead of being stored.

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
# Features of a segment on other devices. With segments as on a CPU, an H200 takes 47 ms for 65,536 tokens of RFA,
# mostly to launch the products of 128 segments. This limit costs 64 MB for each copy of the features.
LAUNCHED_ENTRIES = 2**24


class LinearState(NamedTuple):
    """The sums over the keys and values so far, after decay.

    sums: Σ φ(k) vᵀ, (b, h, f, d). total: Σ φ(k), (b, h, f).
    mass: number of keys, decayed in the same way, (b, h or 1, 1, 1); only for maps with a floor.
    peak: for features in logarithms, the largest of each so far, (b, h, f); both sums are divided by its exponential.
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
    """Bidirectional linear attention over the real tokens: (b, h, n, d). O(n·f·d) time and O(n·d) memory."""
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
    r"""Causal linear attention after `state`: outputs (b, h, n, d) and the state after the last key.

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
    """`causal_linear_attention` for one token, n = 1, as a recurrence. O(f·d), independent of the past."""
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
    """The weights of all pairs, (b, h, n, n), which the functions above never write out. O(n²·f).

    Rows sum to 1, to less if the map has a floor, and to 0 at padding.
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
            # the query's weights of the features, over the sums of the keys that it attends to
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
    """The inputs in one dtype; masks and gates with the axes of the features."""
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
    """Tokens of a segment, a multiple of the chunk, for `of_token` features per token in all heads of a batch."""
    entries = SEGMENT_ENTRIES if device.type == "cpu" else LAUNCHED_ENTRIES
    return max(1, entries // (of_token * CHUNK)) * CHUNK


def plan(k: Tensor, feature_map: FeatureMap, projection: Tensor | None) -> tuple[int | None, Callable[..., Any]]:
    """Choose the tokens of a segment, None for the whole sequence, and how to call the function of a segment.

    The call is direct, or through `checkpoint` if there are too many features to be stored.
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
    """Split the tensors along axis 2 into pieces of `size`; slices would each have a gradient of full length."""
    if size is None or size >= tensors[0].shape[2]:  # type: ignore[union-attr]
        yield tensors
        return
    count = -(-tensors[0].shape[2] // size)  # type: ignore[union-attr]
    yield from zip(*([None] * count if x is None else x.split(size, 2) for x in tensors), strict=True)


def join_segments(parts: list[Tensor]) -> Tensor:
    """Join segments (b, h, s, d) to (b, h, n, d), a view of (b, n, h, d), the layout the output projection needs."""
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def key_features(
    k: Tensor,
    padding_mask: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    causal: bool = False,
) -> tuple[Tensor, LinearState | None, Tensor | None]:
    """φ(k), 0 at padding, `state` in the same units, and the peak so far.

    If `causal`, features are at least exp(-43) of the largest one in their segment (exp(-354) in float64), so that a
    query before the key with the peak has weights that do not all underflow.
    """
    features = feature_map(k, projection)
    if not feature_map.in_logs:
        return features if padding_mask is None else features * padding_mask, state, None
    lowest = torch.finfo(features.dtype).min
    seen = features.detach()  # the result does not depend on the peak, so it needs no gradient
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
    """φ(q); for features in logarithms their softmax, because a factor per query cancels out."""
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
    """The state after some more keys; a gate weights each of them by 1 - g."""
    features, state, peak = key_features(k, padding_mask, state, feature_map, projection)
    if log_decay is not None:
        features = features * -torch.expm1(log_decay)
    sums, total = features.transpose(-1, -2) @ v, features.sum(2)
    mass = masses(k, padding_mask, log_decay, state)[:, :, -1:] if feature_map.floor else None
    if state is not None:
        sums, total = state.sums + sums, state.total + total
    return LinearState(sums, total, mass, peak)


def masses(k: Tensor, padding_mask: Tensor | None, log_decay: Tensor | None, state: LinearState | None) -> Tensor:
    """The `mass` after each of these keys, (b, h or 1, n, 1)."""
    before = 0 if state is None or state.mass is None else state.mass
    if log_decay is not None:
        return 1 - log_decay.cumsum(2).exp() * (1 - before)
    real = k.new_ones(k.shape[0], 1, k.shape[2], 1) if padding_mask is None else padding_mask.to(k.dtype)
    return before + real.cumsum(2)


def divided(mixed: Tensor, weight: Tensor, mass: Tensor | None, feature_map: FeatureMap) -> Tensor:
    """Σ w v divided by Σ w, or by the floor if that is larger; 0 without a key."""
    return mixed / nonzero(weight if mass is None else torch.maximum(weight, feature_map.floor * mass))


def read(q: Tensor, state: LinearState, feature_map: FeatureMap, projection: Tensor | None) -> Tensor:
    """Output of queries that attend to all of a state, (b, h, n, d)."""
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
    """Apply `causal_linear_attention` to one segment of the sequence."""
    keys, state, peak = key_features(k, padding_mask, state, feature_map, projection, causal=True)
    queries = query_features(q, peak, feature_map, projection)
    if feature_map.per_feature:
        total = keys.cumsum(2)
        queries = queries / nonzero(total if state is None else total + state.total[:, :, None])
    products = fla_products if use_fla else chunked_products
    mixed, weight, sums, total = products(queries, keys, v, log_decay, state)
    mass = masses(k, padding_mask, log_decay, state) if feature_map.floor else None
    if not feature_map.per_feature:  # the weights already sum to 1
        mixed = divided(mixed, weight, mass, feature_map)
    return mixed, LinearState(sums, total, None if mass is None else mass[:, :, -1:], peak)


def chunked_products(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: LinearState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Weighted sums over the past, for mapped `q` and `k` (b, h, n, f), chunk by chunk.

    .. math:: o_i = \sum_{j \le i} w_{ij} v_j, \qquad z_i = \sum_{j \le i} w_{ij}, \qquad
              w_{ij} = q_i^\top k_j\, (1 - g_j)\, G_i / G_j, \qquad G_i = g_1 \cdots g_i

    without a gate :math:`w_{ij} = q_i^\top k_j`. Within a chunk the weights are written out; the keys before chunk c
    are summed up in a state :math:`S_c`. Returns o (b, h, n, d), z (b, h, n, 1), and the state after the last key: its
    sums (b, h, f, d) and its total (b, h, f), which is the same without the values.
    """
    length, size = q.shape[2], CHUNK if is_traced() else min(CHUNK, q.shape[2])
    q, k, v = (padded_chunks(x, size) for x in (q, k, v))  # (b, h, c, size, ·)
    w = q @ k.transpose(-1, -2)  # q_i · k_j
    between = q.new_ones(q.shape[2], q.shape[2])  # decay from the end of chunk b < c to the start of chunk c
    if log_decay is None:
        w, between, initial, last = w.tril_(), between.tril(-1), None, None
    else:
        log_g = padded_chunks(log_decay, size)
        share = -torch.expm1(log_g)  # 1 - g_j
        log_G = log_g.cumsum(3)  # G_i within the chunk
        log_chunk = log_G[..., -1, :]  # G of a whole chunk, (b, h, c, 1)
        log_end = log_chunk.cumsum(2)  # from the start of the segment to the end of chunk c
        w = w * (decay_between(log_G, log_G) * share.transpose(-1, -2))  # · (1 - g_j) G_i / G_j
        between = decay_between(log_end - log_chunk, log_end, -1)
        initial = (log_end - log_chunk).exp()  # decay from the start of the segment to the start of chunk c
        last = log_chunk[:, :, -1].exp()
        k, q = k * (share * (log_chunk[..., None, :] - log_G).exp()), q * log_G.exp()
    own, own_total = k.transpose(-1, -2) @ v, k.sum(3)  # U_c = Σ_j (1 - g_j) G_end / G_j · k_j v_jᵀ
    before = (between @ own.flatten(-2)).unflatten(-1, own.shape[-2:])  # S_c = Σ_b between_cb U_b
    before_total = between @ own_total
    if state is not None:  # S_c += initial_c S_0
        carried, carried_total = state.sums[:, :, None], state.total[:, :, None]
        before = before + (carried if initial is None else carried * initial[..., None])
        before_total = before_total + (carried_total if initial is None else carried_total * initial)
    mixed = w @ v + q @ before  # o_i = Σ_j w_ij v_j + G_i q_i · S_c
    weight = w.sum(-1, keepdim=True) + dot(q, before_total[..., None, :])  # z_i
    sums, total = before[:, :, -1], before_total[:, :, -1]
    if last is not None:  # S = G_end S_c + U_c, for the last chunk
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
    return x.unflatten(2, (-1, size)).contiguous()  # copy once, or every product would


def nonzero(x: Tensor) -> Tensor:
    """x with 1 instead of 0, for a division: without a key the sum of the values is 0 as well."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1, x)


def fla_takes(q: Tensor) -> bool:
    """Is flash-linear-attention installed, and does it support `q`?"""
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
