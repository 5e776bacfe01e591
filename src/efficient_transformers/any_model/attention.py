"""The attention function registered as "efficient": choose an engine for a layer, and call it.

An engine can compute a layer if its mask is known (a `LazyMask`), nothing else changes its scores, and its queries and
keys are the same tokens. All other layers are passed on to SDPA, or to the model's own eager attention if the model
does not support SDPA; a rule that was set for such a layer becomes a dense mask.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import logging

from ..models.attn_linear import causal_linear_attention, linear_attention
from ..models.attn_pattern import dense_mask
from ..models.attn_pattern import pattern_attention as engine
from ..models.attn_pattern_flex import SMALLEST_HEAD
from ..models.ops_engine import BatchRows
from ..models.ops_feature_maps import FEATURE_MAPS, FeatureMap, gaussian_projection, orthogonal_projection
from ..models.ops_patterns import AttentionPattern
from .cache import BoundedLayer
from .masks import LazyMask, MaskRule, Spans, has_sdpa
from .rules import HeadRule, Rule, parse_rule

logger = logging.get_logger(__name__)

# Arguments that do not change the scores. Layers with any other argument are passed on.
HARMLESS = {
    "is_causal", "sliding_window", "position_ids", "cache_position", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache", "num_items_in_batch", "deterministic", "logits_to_keep", "position_embeddings",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids",
}  # fmt: skip
ONLY_EAGER = ("softcap", "s_aux")  # SDPA raises for the first and ignores the second
# Keys selected by a model, which merges them only into the masks of SDPA and eager attention.
SELECTIONS = ("indices", "block_indices")
CHUNK = 256  # smallest number of queries in a chunk, if there are fewer queries than keys


class Call(NamedTuple):
    """Arguments of an attention function."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    options: dict[str, Any]


def efficient_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer of any model, by the rule set for it, or else as requested by the model.

    `query` is (b, h, q, d); `key` and `value` are (b, h_kv, k, d), where h is a multiple of h_kv; `attention_mask` is a
    `LazyMask`, a mask in the format of SDPA, or None. Returns (b, q, h, d) and None, or the outputs of the model's
    eager attention.
    """
    call = Call(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    rule = rule_of(call)
    if rule is not None:
        return apply_rule(call, rule)
    if not isinstance(attention_mask, LazyMask):
        return pass_on(call)
    reason = obstacle(call)
    if reason is not None:
        warn(module, reason)
        return pass_on(call)
    asked = attention_mask.rule
    spans = whole_sequences(call)
    if asked.before is not None and spans is None and asked.documents is None:
        return by_chunks(call, asked), None
    if spans is None or (asked.before != asked.after and not asked.causal):
        return pass_on(call)
    pattern = AttentionPattern(asked.before, causal=asked.causal)
    attend = partial(pattern_attention, rule=HeadRule(pattern), dropout=dropout)
    return by_spans(attend, scaled(call), key, value, spans), None


# --- which rule, and whether an engine can serve it


def rule_of(call: Call) -> Rule | None:
    """The rule that `set_attention` stored for this layer."""
    stored = getattr(getattr(call.module, "config", None), "efficient_attention", None)
    if stored is None:
        return None
    layer = getattr(call.module, "layer_idx", None)
    if "pattern" in stored:
        spec = stored["pattern"]
    else:
        if layer is None:
            raise ValueError(f"{type(call.module).__name__} has no layer_idx: call set_attention without layers.")
        spec = stored["layers"][layer]
    return None if spec is None else parse_rule(spec, is_causal(call), layer or 0)


def is_causal(call: Call) -> bool:
    if isinstance(call.mask, LazyMask):
        return call.mask.rule.causal
    if not has_sdpa(type(getattr(call.module, "config", None))):
        return False  # eager attention receives every mask except an empty one
    flag = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if flag is None else flag)


def obstacle(call: Call) -> str | None:
    """The reason why no engine can compute this call, as a phrase; None if an engine can."""
    for name, value in call.options.items():
        if value is not None and value is not False and name not in HARMLESS:
            return f"an argument {name} that may change its scores"
    if call.value.shape[-1] != call.query.shape[-1]:
        return f"values of another size ({call.value.shape[-1]}) than its keys ({call.query.shape[-1]})"
    if not call.query.shape[0] == call.key.shape[0] == call.value.shape[0]:
        return "queries and keys of different batch sizes"
    return None


def warn(module: nn.Module, reason: str) -> None:
    logger.warning_once(f'attn_implementation="efficient" passes {type(module).__name__} on, because it has {reason}.')


def whole_sequences(call: Call) -> Spans | None:
    """The sequences of each row, if queries and keys are the same tokens and padding interrupts no sequence."""
    mask, queries, keys = call.mask, call.query.shape[2], call.key.shape[2]
    if not isinstance(mask, LazyMask) or (queries, keys) != tuple(mask.shape[2:]) or mask.q_offset != mask.kv_offset:
        return None
    if keys != queries and not (keys > queries and mask.rule.causal):  # a static cache has unused space after the query
        return None
    return mask.spans


# --- engines


def scaled(call: Call) -> Tensor:
    """Queries for an engine that divides by √d, multiplied so that the model's own scale results."""
    dim = call.query.shape[-1]
    factor = 1.0 if call.scaling is None else call.scaling * dim**0.5
    return call.query if abs(factor - 1) < 1e-9 else call.query * factor


def by_spans(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Apply `attend(q, k, v, lengths)` to each sequence separately, (b, n, h, d); zeros at padding.

    One call for the whole batch if each row starts with its only sequence; otherwise one call per sequence.
    """
    length = q.shape[2]
    if k.shape[2] > length:
        k, v = k[:, :, :length], v[:, :, :length]
    if all(len(row) == 1 and row[0][0] == 0 for row in spans):
        return attend(q, k, v, [row[0][1] for row in spans]).transpose(1, 2).contiguous()
    parts = []
    for queries, keys, values, row in zip(q.split(1), k.split(1), v.split(1), spans, strict=True):
        sizes, real, end = [], [], 0
        for start, stop in [*row, (length, length)]:
            sizes, real = [*sizes, start - end, stop - start], [*real, False, True]
            end = stop
        pieces = zip(*(x.split(sizes, 2) for x in (queries, keys, values)), strict=True)
        for piece, is_real in zip(pieces, real, strict=True):
            if piece[0].shape[2]:
                out = attend(*piece, [piece[0].shape[2]]) if is_real else torch.zeros_like(piece[0])
                parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).unflatten(0, (len(q), length))


def pattern_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: HeadRule, dropout: float
) -> Tensor:
    """Softmax attention over a pattern, (b, h, n, d); grouped queries share keys without copying them."""
    rows = batch_rows(lengths, rule, q)
    kernel = q.device.type == "cuda" and q.shape[-1] >= SMALLEST_HEAD and not rule.pattern.is_full
    implementation = "flex_attention" if kernel else "sdpa"
    attend = partial(engine, pattern=rule.pattern, rows=rows, dropout=dropout, implementation=implementation)
    if not rule.pattern.num_random_blocks and k.shape[1] < q.shape[1]:
        groups = q.unflatten(1, (k.shape[1], -1)).unbind(2)
        parts = [attend(group, k, v) for group in groups]
        return torch.stack([part.transpose(1, 2) for part in parts], 3).flatten(2, 3).transpose(1, 2)
    k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))  # each head has its own random blocks
    return attend(q, k, v)


def batch_rows(lengths: Sequence[int], rule: HeadRule, q: Tensor) -> BatchRows:
    """Row lengths and global tokens, as numbers for the tiled engine and as masks for engines of other devices."""
    last = [rule.last_tokens(length) for length in lengths] if rule.last else None
    if q.device.type == "cpu":
        return BatchRows(lengths=lengths, global_tokens=last)
    position, count = torch.arange(q.shape[2], device=q.device), torch.tensor(lengths, device=q.device)[:, None]
    padding_mask = None if min(lengths) == q.shape[2] else position < count
    global_mask = (position < count) & (position >= count - rule.last) if rule.last else None
    return BatchRows(padding_mask=padding_mask, lengths=lengths, global_mask=global_mask, global_tokens=last)


def by_chunks(call: Call, asked: MaskRule) -> Tensor:
    """A window where queries and keys are not the same tokens: chunks of queries, each with only the keys near it."""
    assert isinstance(call.mask, LazyMask)
    assert asked.before is not None
    mask, padding, device = call.mask, call.mask.padding, call.query.device
    if padding is not None:
        missing = mask.kv_offset + call.key.shape[2] - padding.shape[1]
        padding = F.pad(padding, (0, missing)) if missing > 0 else padding
    row, size, out = torch.zeros((), dtype=torch.long, device=device), max(asked.before, CHUNK), []
    for start in range(0, call.query.shape[2], size):
        stop = min(start + size, call.query.shape[2])
        first = max(0, mask.q_offset + start - asked.before - mask.kv_offset)
        end = call.key.shape[2]
        if asked.after is not None:
            end = min(end, mask.q_offset + stop + asked.after - mask.kv_offset)
        i = torch.arange(mask.q_offset + start, mask.q_offset + stop, device=device)
        j = torch.arange(mask.kv_offset + first, mask.kv_offset + end, device=device)
        allowed = asked.allows(row, i[:, None], j)[None, None]
        if padding is not None:
            allowed = allowed & padding[:, None, None, j]
        part = call._replace(
            query=call.query[:, :, start:stop], key=call.key[:, :, first:end], value=call.value[:, :, first:end],
            mask=allowed.expand(len(call.query), -1, -1, -1),
        )  # fmt: skip
        out.append(pass_on(part)[0])
    return torch.cat(out, 1)


# --- rules of `set_attention`


def apply_rule(call: Call, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Compute the outputs of `efficient_attention` by a rule."""
    reason, spans = obstacle(call), whole_sequences(call)
    layer: BoundedLayer | None = getattr(call.key, "bounded_layer", None)
    if layer is not None:
        numbers = place_tokens(call, layer)
    elif isinstance(call.mask, LazyMask) and call.mask.q_offset + call.query.shape[2] > sum(call.mask.keys):
        raise ValueError(
            f"{type(call.module).__name__} modifies the keys of a BoundedCache: use a DynamicCache instead."
        )
    if call.mask is None and call.query.shape[2] == call.key.shape[2]:
        spans = [[(0, call.query.shape[2])]] * len(call.query)
    if rule.kernel:
        return kernel_rule(call, rule, spans, reason), None
    if reason is None and spans is not None:
        attend = partial(heads_attention, rule=rule, dropout=call.dropout)
        return by_spans(attend, scaled(call), call.key, call.value, spans), None
    if reason is not None:
        warn(call.module, reason + "; its rule is computed as a dense mask")
    if layer is not None:
        return pass_on(call._replace(mask=rule_mask(rule, call.query.shape[1], *numbers)))
    return pass_on(call._replace(mask=dense_rule(call, rule)))


def place_tokens(call: Call, layer: BoundedLayer) -> tuple[Tensor, Tensor]:
    """Number the new tokens in a bounded cache; return the positions of queries and keys, (b, q) and (b, k)."""
    mask = call.mask
    if not isinstance(mask, LazyMask) or mask.rule.documents is not None:
        raise ValueError("a BoundedCache needs a padding mask, (b, tokens so far), or no mask.")
    queries = mask.positions[:, mask.q_offset :][:, : call.query.shape[2]].expand(len(call.query), -1)
    return queries, layer.place(queries)


def heads_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: Rule, dropout: float) -> Tensor:
    """Attention of each head by its own pattern, (b, h, n, d)."""
    groups = rule.groups(q.shape[1])
    if len(groups) == 1:
        return pattern_attention(q, k, v, lengths, groups[0][0], dropout)
    share, mixed = q.shape[1] // k.shape[1], []
    for head_rule, heads in groups:
        which = torch.tensor(heads, device=q.device)
        part = q[:, which], k[:, which // share], v[:, which // share]
        mixed.append(pattern_attention(*part, lengths, head_rule, dropout))
    order = torch.tensor([head for _, heads in groups for head in heads], device=q.device).argsort()
    return torch.cat(mixed, 1)[:, order]


def dense_rule(call: Call, rule: Rule) -> Tensor:
    """The rule as a mask (b, 1 or h, q, k), combined with the model's mask except for its window."""
    queries, keys = positions(call, rule)
    rows, mask = len(call.query), call.mask
    allowed = rule_mask(rule, call.query.shape[1], queries.expand(rows, -1), keys.expand(rows, -1))
    if mask is None:
        return allowed
    if isinstance(mask, LazyMask):
        documents = mask.rule.documents
        return allowed if documents is None else allowed & (documents[:, None, :, None] == documents[:, None, None])
    return allowed & mask if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def rule_mask(rule: Rule, num_heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """The rule as a mask (b, 1 or h, q, k) between positions (b, q) and (b, k), which are -1 at padding."""
    i, j = queries[:, None, :, None], keys[:, None, None, :]
    length = (j.amax(-1, keepdim=True) + 1).clamp(min=1)
    groups, masks = rule.groups(num_heads), []
    for head_rule, heads in groups:
        allowed = dense_mask(head_rule.pattern, len(heads), queries, keys)
        if head_rule.last:
            allowed = allowed | (i >= length - head_rule.last) | (j >= length - head_rule.last)
        masks.append(allowed)
    if len(masks) == 1:
        return masks[0] & (j >= 0)
    order = torch.tensor([head for _, heads in groups for head in heads], device=i.device).argsort()
    parts = [mask.expand(-1, len(heads), -1, -1) for mask, (_, heads) in zip(masks, groups, strict=True)]
    return torch.cat(parts, 1)[:, order] & (j >= 0)


def positions(call: Call, rule: Rule) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys among the real tokens, (b or 1, q) and (b or 1, k), -1 at padding.

    Raises ValueError if a cache has dropped keys that the rule needs.
    """
    mask, (queries, keys) = call.mask, (call.query.shape[2], call.key.shape[2])
    if isinstance(mask, LazyMask):
        if mask.kv_offset and (rule.reach is None or rule.sinks or mask.q_offset - rule.reach < mask.kv_offset):
            raise ValueError(
                f"the cache of {type(call.module).__name__} has dropped its first {mask.kv_offset} tokens, which "
                "its rule attends to: pass past_key_values=efficient_transformers.BoundedCache(model)."
            )
        first = mask.positions
        return first[:, mask.q_offset :][:, :queries], first[:, mask.kv_offset :][:, :keys]
    index = torch.arange(keys, device=call.query.device)[None]
    if mask is None:
        return index[:, keys - queries :], index
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = allowed.any(2).any(1)
    number = real.cumsum(1)
    if queries == keys:  # a document starts where a real token does not attend to the previous one
        hidden = ~allowed.any(1).diagonal(-1, 1, 2) & real[:, 1:] & real[:, :-1]
        starts = F.pad(hidden, (1, 0)) * (number - 1)
        number = number - starts.cummax(1).values
    number = (number - 1).masked_fill(~real, -1)
    return number[:, keys - queries :], number


# --- kernel mixers


FEATURES = {"linear": "elu", "efficient": "softmax", "performer": "positive", "rfa": "trigonometric"}


def kernel_rule(call: Call, rule: Rule, spans: Spans | None, reason: str | None) -> Tensor:
    """A kernel mixer instead of softmax attention, (b, q, h, d); it has no weights, so dropout has no effect."""
    mask, (queries, keys) = call.mask, (call.query.shape[2], call.key.shape[2])
    if reason is None and mask is not None and not isinstance(mask, LazyMask):
        reason = "a mask that is not only padding"
    if reason is not None:
        raise ValueError(
            f"{rule.kernel!r} cannot be used for {type(call.module).__name__}, which has {reason}: choose a pattern "
            "instead."
        )
    causal = is_causal(call)
    attend = partial(kernel_attention, rule=rule, causal=causal, scaling=call.scaling)
    if isinstance(mask, LazyMask) and mask.rule.documents is not None:
        assert spans is not None
        return by_spans(lambda q, k, v, _: attend(q, k, v), call.query, call.key, call.value, spans)
    padding_mask = None
    if isinstance(mask, LazyMask):
        if mask.kv_offset:
            positions(call, rule)  # for its error
        keys = min(keys, mask.q_offset + queries) if causal else keys
        padding_mask = None if mask.padding is None else mask.positions[:, :keys] >= 0
    out = attend(call.query, call.key[:, :, :keys], call.value[:, :, :keys], padding_mask)
    return out.transpose(1, 2).contiguous()


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None = None,
    *,
    rule: Rule,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    """Attention through a feature map, (b, h, q, d). Queries belong to the last keys; `padding_mask` (b, k)."""
    k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    features: FeatureMap = FEATURE_MAPS[FEATURES[rule.kernel or ""]]
    if rule.kernel == "performer":  # estimates the softmax of q·k
        scale = (q.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
        q, k = q * scale, k * scale
    elif rule.kernel == "rfa":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    projection = None
    if features.is_random:
        projection = random_projection(rule, q.shape[1], q.shape[-1]).to(q.device)
    if not causal:
        return linear_attention(q, k, v, features, projection, padding_mask)
    before = k.shape[2] - q.shape[2]
    queries = F.pad(q, (0, 0, before, 0)) if before else q
    out = causal_linear_attention(queries, k, v, features, projection, padding_mask)[0]
    return out[:, :, before:]


@lru_cache(maxsize=256)
def random_projection(rule: Rule, num_heads: int, dim: int) -> Tensor:
    """The random features of a layer, (h, features, d). They depend only on its number, so that nothing is stored."""
    make = orthogonal_projection if rule.kernel == "performer" else gaussian_projection
    return make(num_heads, rule.num_features, dim, torch.Generator("cpu").manual_seed(rule.seed))


# --- SDPA and eager


def pass_on(call: Call) -> tuple[Tensor, Tensor | None]:
    """Call SDPA, or the model's own attention if it has no SDPA or requests something that SDPA cannot compute."""
    module, options = call.module, call.options
    supported, eager = has_sdpa(type(getattr(module, "config", None))), eager_function(type(module))
    uses_sdpa = eager is None or (supported and all(options.get(name) is None for name in ONLY_EAGER))
    mask = call.mask
    if isinstance(mask, LazyMask):
        mask = mask.for_sdpa if uses_sdpa else mask.dense
    picks = {name for name in SELECTIONS if options.get(name) is not None}
    if mask is None and is_causal(call) and call.query.shape[2] > 1 and (picks or not uses_sdpa):
        queries, keys = call.query.shape[2], call.key.shape[2]  # for SDPA, the flag is_causal would suffice
        mask = torch.ones(queries, keys, dtype=torch.bool, device=call.query.device).tril()[None, None]
    if picks:
        mask = selected(call, mask)
        options = {name: value for name, value in options.items() if name not in SELECTIONS}
    arguments = module, call.query, call.key, call.value
    if uses_sdpa:
        return sdpa_attention_forward(*arguments, mask, dropout=call.dropout, scaling=call.scaling, **options)
    assert eager is not None
    scaling = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    return eager(*arguments, as_float(mask, call.query), dropout=call.dropout, scaling=scaling, **options)


def as_float(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Convert a boolean mask to values that eager attention adds to its scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(like.dtype).min)


def selected(call: Call, mask: Tensor | None) -> Tensor:
    """`mask` combined with the keys that a model selected for each query, which it merges only into masks for SDPA."""
    if call.options.get("block_indices") is not None:
        indexer = getattr(call.module, "indexer", None)
        if indexer is None or not hasattr(indexer, "build_block_mask"):
            raise ValueError(f"{type(call.module).__name__} selects blocks of keys: use attn_implementation='sdpa'.")
        shape = call.key.shape[2], call.query.dtype, call.query.device
        return indexer.build_block_mask(call.options["block_indices"], mask, *shape, None)
    indices = call.options["indices"]  # (b, q, chosen)
    chosen = torch.zeros(*indices.shape[:2], call.key.shape[2], dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


@lru_cache(maxsize=1024)
def eager_function(module_class: type[nn.Module]) -> Callable[..., Any] | None:
    """The eager attention function in the file that defines this module, if there is one."""
    return getattr(sys.modules[module_class.__module__], "eager_attention_forward", None)
