"""Report the attention that each layer of a model requests, the engine that computes it, and its cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedConfig, PreTrainedModel

from ..costs import pairs
from ..models.ops_feature_maps import FEATURE_MAPS
from ..models.ops_patterns import AttentionPattern
from ..trust import refusing_code
from .attention import FEATURES, ONLY_EAGER, Call, obstacle, rule_of
from .configure import check_interface, set_attention
from .masks import LazyMask, MaskRule, UnknownMask, has_sdpa, recognise
from .rules import Rule, Spec

KEY = "efficient_report"


@dataclass(frozen=True)
class LayerReport:
    """One attention layer. asks: attention requested by the model. engine: its engine, with the reason if it is SDPA.

    before, after: multiplications between queries, keys and values for one sequence: with SDPA or eager attention,
    which multiply every pair unless SDPA's causal flag suffices, and with the engine.
    """

    name: str
    asks: str
    engine: str
    before: int
    after: int


def attention_report(
    source: str | PreTrainedConfig, length: int = 4096, pattern: Spec | None = None, *, trust_remote_code: bool = False
) -> list[LayerReport]:
    """Report the layers of a model, built without weights from its config (a Hub name, a folder or a config).

    `pattern` is first set for all layers, as by `set_attention`. `trust_remote_code` allows code that comes with the
    model to run. Raises ValueError for a model whose attention cannot be replaced, and trust.UntrustedCodeError, which
    names the code, for one that needs its own code.
    """
    from transformers import AutoConfig

    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        with refusing_code(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    try:
        return report_of(config, length, pattern, "meta", trust_remote_code)
    except (RuntimeError, NotImplementedError):  # control flow that depends on values
        return report_of(config, length, pattern, "cpu", trust_remote_code)


def report_of(
    config: PreTrainedConfig, length: int, pattern: Spec | None, device: str, trust_remote_code: bool = False
) -> list[LayerReport]:
    config = deepcopy(config)
    config._attn_implementation = None
    with torch.device(device):
        model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=trust_remote_code).eval()
        check_interface(model)
        if pattern is not None:
            set_attention(model, pattern)
        ids = torch.ones(1, 8, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with recorded(model) as calls, torch.no_grad():
            model(**inputs)
    names = {id(module): name for name, module in model.named_modules()}
    return [layer_report(names[id(call.module)], call, length) for call in calls]


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Run a model with an attention that computes nothing, and collect its calls."""
    calls: list[Call] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, dropout=0.0, scaling=None, **options
    ):
        calls.append(Call(module, query, key, value, mask, dropout, scaling, options))
        shape = query.shape[0], query.shape[2], query.shape[1], value.shape[-1]
        return query.new_zeros(shape), None

    AttentionInterface.register(KEY, attend)
    AttentionMaskInterface.register(KEY, recorded_mask)
    try:
        model.set_attn_implementation(KEY)
        yield calls
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(KEY, None)


def recorded_mask(q_offset=0, kv_offset=0, attention_mask=None, **arguments) -> LazyMask:
    """Record the rule of a mask function, or the name of an unknown one."""
    try:
        if arguments.get("use_vmap"):
            raise UnknownMask("a mask with custom parts")
        rule = recognise(arguments["mask_function"])
    except UnknownMask as unknown:
        rule = MaskRule()
        arguments["unknown"] = str(unknown)
    arguments.setdefault("dtype", torch.float32)
    return LazyMask.make(rule, int(q_offset), int(kv_offset), None, arguments)


def layer_report(name: str, call: Call, length: int) -> LayerReport:
    asked = call.mask.rule if isinstance(call.mask, LazyMask) else None
    unknown = (
        call.mask.arguments.get("unknown") if isinstance(call.mask, LazyMask) else "a mask that it modifies itself"
    )
    heads, size = call.query.shape[1], call.query.shape[-1] + call.value.shape[-1]
    reason, rule = obstacle(call), rule_of(call)
    plain = "SDPA" if has_sdpa(type(getattr(call.module, "config", None))) else "eager attention"
    if any(call.options.get(option) is not None for option in ONLY_EAGER):
        plain = "eager attention"
    causal = asked is not None and asked.causal
    uses_flag = causal and asked is not None and asked.is_plain and plain == "SDPA" and unknown is None
    dense = heads * size * length**2
    before = heads * size * pair_count(AttentionPattern(None, causal=True), length) if uses_flag else dense
    asks = unknown or describe(asked)
    if rule is not None:
        asks = f"{asks}; set: {' / '.join(text(rule))}"
        if reason is not None:
            return LayerReport(name, asks, f"{plain}, dense mask: {reason}", before, dense)
        return LayerReport(name, asks, "kernel" if rule.kernel else "tiled", before, cost_of(rule, call, length))
    if reason is not None or unknown is not None:
        return LayerReport(name, asks, f"{plain}: {unknown or reason}", before, before)
    assert asked is not None
    if asked.is_plain:
        return LayerReport(name, asks, "SDPA, rows at their own length", before, before)
    if asked.before is None or (not causal and asked.before != asked.after):
        return LayerReport(name, asks, plain, before, before)
    after = heads * size * pair_count(AttentionPattern(asked.before, causal=causal), length)
    return LayerReport(name, asks, "tiled", before, after)


def describe(rule: MaskRule | None) -> str:
    """Describe a mask rule."""
    assert rule is not None
    direction = "causal" if rule.causal else "bidirectional"
    if rule.before is None:
        return f"full, {direction}"
    return f"window of {rule.before + 1 if rule.causal else 2 * rule.before + 1} tokens, {direction}"


def text(rule: Rule) -> list[str]:
    """The distinct patterns of a rule."""
    if rule.kernel:
        return [f"{rule.kernel}:{rule.num_features}" if rule.num_features else rule.kernel]
    names = []
    for head in rule.heads:
        first = f"global:{len(head.pattern.global_tokens)}"
        names.append(head.pattern.name.replace(first, f"{first}:{head.last}") if head.last else head.pattern.name)
    return list(dict.fromkeys(names))


def cost_of(rule: Rule, call: Call, length: int) -> int:
    """Multiplications of a rule in one layer."""
    heads, keys, values = call.query.shape[1], call.query.shape[-1], call.value.shape[-1]
    if rule.kernel:  # features of queries and keys, the sums of the keys, and the products with them
        drawn, found = rule.num_features, FEATURE_MAPS[FEATURES[rule.kernel]]
        features = drawn * found.per_row if drawn else keys
        return heads * length * (2 * drawn * keys + 2 * features * values)
    total = 0
    for head_rule, which in rule.groups(heads):
        pattern = head_rule.pattern.with_global(head_rule.last_tokens(length))
        total += len(which) * pair_count(pattern, length)
    return total * (keys + values)


pair_count = lru_cache(maxsize=1024)(pairs)
