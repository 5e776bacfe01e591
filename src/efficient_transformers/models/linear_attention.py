r"""Attention through a feature map, in time linear in the length.

.. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

Katharopoulos et al. 2020 (arXiv:2006.16236), equations 4 to 6. The sums over the keys are a state of fixed size:
`linear_attention` takes it over all keys, `causal_linear_attention` carries it from chunk to chunk, and
`linear_attention_step` from token to token; `attention_matrix` writes out the n×n weights that all three stand for.

Long sequences go by segments, whose features stay in the cache of the processor; those of very long ones are computed
again in the backward pass instead of being kept.

Shapes: q, k, v (b, h, n, d), features (b, h, n, f), keep (b, n) True at real tokens. All is computed in float32, or in
float64 if that is given, and returned in the dtype of v.
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

from .feature_maps import FeatureMap

# By measurement:
CHUNK = 128  # tokens whose weights are written out
SEGMENT_ENTRIES = 2**19  # features of a segment
KEPT_ENTRIES = 2**24  # features of a sequence that are kept for the backward pass


class LinearState(NamedTuple):
    """What is left of the keys and values so far.

    sums: Σ φ(k)[v, 1]ᵀ, (b, h, f, d + 1); the last column is the normaliser.
    peak: where features come as logarithms, the largest of each so far, (b, h, f); sums are in units of its exp.
    """

    sums: Tensor
    peak: Tensor | None = None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Every query reads every key that is kept: (b, h, n, d). O(n·f·d) time and O(n·d) memory."""
    q, k, values, keep, _ = prepared(q, k, v, keep)
    size, run = segment_size(k, feature_map, projection), runner(k, feature_map, projection)
    state = None
    with torch.autocast(q.device.type, enabled=False):
        for keys, rows, kept in segments(size, k, values, keep):
            state = run(absorb, keys, rows, kept, state, feature_map, projection)
        out = [run(read, queries, state, feature_map, projection) for (queries,) in segments(size, q)]
    return torch.cat(out, 2).to(v.dtype)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    keep: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    r"""A query reads `state` and the keys up to its own: (b, h, n, d), and the state behind the last one.

    `log_decay` (b, h, n) is log g of a recency gate: :math:`S_t = g_t S_{t-1} + (1 - g_t)\,\phi(k_t) [v_t, 1]^\top`
    (Peng et al. 2021, arXiv:2103.02143, section 3.2). O(n·f·d) time and O(n·d) memory.
    """
    q, k, values, keep, log_decay = prepared(q, k, v, keep, log_decay)
    use_fla = fla_takes(q)
    size = None if use_fla else segment_size(k, feature_map, projection)
    run = runner(k, feature_map, projection)
    out = []
    with torch.autocast(q.device.type, enabled=False):
        for segment in segments(size, q, k, values, keep, log_decay):
            mixed, state = run(causal_segment, *segment, state, feature_map, projection, use_fla)
            out.append(mixed)
    assert state is not None
    return torch.cat(out, 2).to(v.dtype), state


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    keep: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    """`causal_linear_attention` of one token, n = 1, as the recurrence it is. O(f·d), whatever came before."""
    q, k, values, keep, log_decay = prepared(q, k, v, keep, log_decay)
    with torch.autocast(q.device.type, enabled=False):
        if log_decay is not None and state is not None:
            state = state._replace(sums=state.sums * log_decay.exp())
        state = absorb(k, values, keep, state, feature_map, projection)
        return read(q, state, feature_map, projection).to(v.dtype), state


def attention_matrix(
    q: Tensor,
    k: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None = None,
    keep: Tensor | None = None,
    causal: bool = False,
    log_decay: Tensor | None = None,
) -> Tensor:
    """The weights of all pairs, (b, h, n, n): what the functions above never write out. O(n²·f).

    Rows sum to 1, those of padding to 0.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    there = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    there = (there.tril() if causal else there)[None, None]
    if keep is not None:
        there = there & keep[:, None, None, :] & keep[:, None, :, None]
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (feature_map(x.to(wide), projection) for x in (q, k))
        if feature_map.in_logs and keep is not None:
            keys = keys.masked_fill(~keep[:, None, :, None], torch.finfo(wide).min)
        if feature_map.per_feature:
            # the weights of the features of each query, over the sums of the keys that it reads
            queries = queries.log_softmax(-1) - (keys.logcumsumexp(2) if causal else keys.logsumexp(2, keepdim=True))
        if feature_map.in_logs:
            peak = keys.amax(2, keepdim=True)
            queries, keys = queries + peak, (keys - peak).exp()
            scale = 0 if feature_map.per_feature else queries.amax(-1, keepdim=True)
            queries = (queries - scale).exp()
        weights = (queries @ keys.transpose(-1, -2)).masked_fill(~there, 0)
        if log_decay is not None:
            passed = log_decay.to(wide).cumsum(-1)
            weights = weights * (passed[..., :, None] - passed[..., None, :]).masked_fill(~there, 0).exp()
            weights = weights * -torch.expm1(log_decay.to(wide))[..., None, :]
        return weights if feature_map.per_feature else weights / nonzero(weights.sum(-1, keepdim=True))


def prepared(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, log_decay: Tensor | None = None) -> tuple:
    """All in one dtype, values with a column of ones and the gate's weight, masks as broad as the features."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    values = F.pad(v.to(wide), (0, 1), value=1.0)
    if log_decay is not None:
        log_decay = log_decay.to(wide)[..., None]
        values = values * -torch.expm1(log_decay)
    return q.to(wide), k.to(wide), values, None if keep is None else keep[:, None, :, None], log_decay


def segment_size(k: Tensor, feature_map: FeatureMap, projection: Tensor | None) -> int | None:
    """Tokens of a segment, a multiple of the chunk; None takes the whole sequence."""
    if torch.compiler.is_compiling():
        return None
    of_token = k.shape[0] * k.shape[1] * num_features(k, feature_map, projection)
    return max(1, SEGMENT_ENTRIES // (of_token * CHUNK)) * CHUNK


def num_features(k: Tensor, feature_map: FeatureMap, projection: Tensor | None) -> int:
    return k.shape[-1] if projection is None else projection.shape[-2] * feature_map.per_row


def runner(k: Tensor, feature_map: FeatureMap, projection: Tensor | None) -> Callable[..., Any]:
    """What calls the function of a segment: itself, or `checkpoint` where there is too much to be kept."""
    entries = k.shape[0] * k.shape[1] * k.shape[2] * num_features(k, feature_map, projection)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or entries <= KEPT_ENTRIES:
        return lambda function, *arguments: function(*arguments)
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def segments(size: int | None, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors in pieces of `size` along axis 2, split at once: slices would each add a gradient of full length."""
    if size is None or size >= tensors[0].shape[2]:  # type: ignore[union-attr]
        yield tensors
        return
    count = -(-tensors[0].shape[2] // size)  # type: ignore[union-attr]
    yield from zip(*([None] * count if x is None else x.split(size, 2) for x in tensors), strict=True)


def key_features(
    k: Tensor,
    keep: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """φ(k), 0 where there is no key; the peak so far; and the sums of `state` in units of that peak.

    A query that does not read the key with the peak must not be left with nothing: if `causal`, no feature is taken for
    less than exp(-43) of the largest one in its segment (exp(-354) in float64).
    """
    features, sums = feature_map(k, projection), None if state is None else state.sums
    if not feature_map.in_logs:
        return features if keep is None else features * keep, None, sums
    lowest = torch.finfo(features.dtype).min
    seen = features.detach()  # the result does not depend on the peak, so nothing is to be learnt from it
    peak = (seen if keep is None else seen.masked_fill(~keep, lowest)).amax(2)
    if state is not None:
        assert state.peak is not None
        peak = torch.maximum(peak, state.peak)
        sums = state.sums * (state.peak - peak).exp()[..., None]
    features = features - peak[:, :, None]
    if causal:
        features = features.clamp(min=math.log(torch.finfo(features.dtype).tiny) / 2)
    return (features if keep is None else features.masked_fill(~keep, lowest)).exp(), peak, sums


def query_features(q: Tensor, peak: Tensor | None, feature_map: FeatureMap, projection: Tensor | None) -> Tensor:
    """φ(q); where features come as logarithms their softmax, for a factor of each query's own divides out."""
    features = feature_map(q, projection)
    if not feature_map.in_logs:
        return features
    assert peak is not None
    return (features if feature_map.per_feature else features + peak[:, :, None]).softmax(-1)


def absorb(
    k: Tensor,
    values: Tensor,
    keep: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
) -> LinearState:
    """The state behind some more keys."""
    features, peak, sums = key_features(k, keep, state, feature_map, projection)
    more = features.transpose(-1, -2) @ values
    return LinearState(more if sums is None else sums + more, peak)


def read(q: Tensor, state: LinearState, feature_map: FeatureMap, projection: Tensor | None) -> Tensor:
    """What queries that read all of a state get, (b, h, n, d)."""
    features = query_features(q, state.peak, feature_map, projection)
    if feature_map.per_feature:
        return features @ quotient(state.sums)
    return quotient(features @ state.sums)


def causal_segment(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    keep: Tensor | None,
    log_decay: Tensor | None,
    state: LinearState | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    use_fla: bool = False,
) -> tuple[Tensor, LinearState]:
    """`causal_linear_attention` of one segment; values have their column of ones."""
    keys, peak, sums = key_features(k, keep, state, feature_map, projection, causal=True)
    queries = query_features(q, peak, feature_map, projection)
    if feature_map.per_feature:
        total = keys.cumsum(2)
        queries = queries / nonzero(total if sums is None else total + sums[..., -1][:, :, None])
    products = fla_products if use_fla else chunked_products
    out, sums = products(queries, keys, values, log_decay, sums)
    return (out[..., :-1] if feature_map.per_feature else quotient(out)), LinearState(sums, peak)


def chunked_products(
    q: Tensor, k: Tensor, values: Tensor, log_decay: Tensor | None, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ_{j ≤ i} (q_i·k_j) v_j with what the gate leaves of it, plus what `sums` holds, (b, h, n, d + 1); new sums.

    Within a chunk the weights are written out; what came before it is read from a state at its beginning.
    """
    length, size = q.shape[2], CHUNK if torch.compiler.is_compiling() else min(CHUNK, q.shape[2])
    q, k, values = (in_chunks(x, size) for x in (q, k, values))  # (b, h, c, size, ·)
    count = q.shape[2]
    weights = q @ k.transpose(-1, -2)
    own = k.transpose(-1, -2) @ values
    earlier = q.new_ones(count, count).tril(-1)
    if log_decay is None:
        weights, carried = weights.tril(), sums
    else:
        passed = in_chunks(log_decay, size).cumsum(3)  # (b, h, c, size, 1), from the beginning of the chunk
        weights = weights * decay_between(passed, passed)
        whole = passed[..., -1, :]  # (b, h, c, 1)
        own = (k * (whole[..., None, :] - passed).exp()).transpose(-1, -2) @ values
        since = whole.cumsum(2)  # from the beginning of the segment
        earlier = decay_between(since - whole, since, -1)
        carried = None if sums is None else sums[:, :, None] * (since - whole).exp()[..., None]
        q = q * passed.exp()
    before = (earlier @ own.flatten(-2)).unflatten(-1, own.shape[-2:])
    if carried is not None:
        before = before + (carried if log_decay is not None else carried[:, :, None])
    out = weights @ values + q @ before
    last = before[:, :, -1]
    if log_decay is not None:
        last = last * whole[:, :, -1, :, None].exp()
    return out.flatten(2, 3)[:, :, :length], last + own[:, :, -1]


def decay_between(to: Tensor, since: Tensor, diagonal: int = 0) -> Tensor:
    """exp(to_i - since_j) for j ≤ i + `diagonal` and 0 elsewhere: (…, n, 1) twice -> (…, n, n)."""
    gone = to - since.transpose(-1, -2)
    there = torch.ones(gone.shape[-2:], dtype=torch.bool, device=gone.device).tril(diagonal)
    return gone.masked_fill(~there, -torch.inf).exp()


def in_chunks(x: Tensor, size: int) -> Tensor:
    """(b, h, n, ·) -> (b, h, c, size, ·), filled up with zeros."""
    length = x.shape[2]
    if torch.compiler.is_compiling():
        # selected by index, because folding a padded sequence would make a traced length a multiple of the chunk
        count = (length + 2 * size - 1) // size
        index = torch.arange(count * size, device=x.device)
        x = x.index_select(2, index.clamp(max=length - 1)) * (index < length)[:, None]
    elif length % size:
        x = F.pad(x, (0, 0, 0, -length % size))
    return x.unflatten(2, (-1, size))


def quotient(sums: Tensor) -> Tensor:
    """The sums of the values over that of the weights, the last column."""
    return sums[..., :-1] / nonzero(sums[..., -1:])


def nonzero(x: Tensor) -> Tensor:
    """x with 1 in the place of 0: of a query that finds no key the sum of the values is 0, too."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1, x)


def fla_takes(q: Tensor) -> bool:
    """Is flash-linear-attention there, and may it run?"""
    return q.is_cuda and q.dtype == torch.float32 and not torch.compiler.is_compiling() and fla() is not None


@lru_cache(maxsize=1)
def fla() -> Any:
    """The module with the kernels of flash-linear-attention, or None."""
    try:
        return import_module("fla.ops.simple_gla")
    except ImportError:
        return None


def fla_products(
    q: Tensor, k: Tensor, values: Tensor, log_decay: Tensor | None, sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`chunked_products` by the kernels of flash-linear-attention; their layout is (b, n, h, ·)."""
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, values))
    gate = None if log_decay is None else log_decay.squeeze(-1).transpose(1, 2).contiguous()
    out, state = fla().chunk_simple_gla(*rows, g=gate, scale=1.0, initial_state=sums, output_final_state=True)
    return out.transpose(1, 2), state
