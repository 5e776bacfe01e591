"""Set the rules of a model's layers, and store them in its config."""

import inspect
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from .attention import efficient_attention
from .masks import efficient_mask
from .rules import Spec, check_spec, specs_of_layers

KEY = "efficient"
NO_CODE = (lambda: None).__code__


def register() -> None:
    """Register `attn_implementation="efficient"` with transformers, and add its rules to every config.

    The setter also writes `attn_implementation`, which transformers does not save: without this package, loading the
    model raises an error instead of silently computing full attention.
    """
    AttentionInterface.register(KEY, efficient_attention)
    AttentionMaskInterface.register(KEY, efficient_mask)

    def read(config: PreTrainedConfig) -> dict | None:
        return config.__dict__.get("efficient_attention")

    def write(config: PreTrainedConfig, stored: dict | None) -> None:
        for name in ("efficient_attention", "attn_implementation"):
            config.__dict__.pop(name, None)
        if stored is not None:
            config.__dict__.update(efficient_attention=stored, attn_implementation=KEY)

    PreTrainedConfig.efficient_attention = property(read, write)  # type: ignore[attr-defined]


def set_attention(
    model: PreTrainedModel, pattern: Spec | None, layers: Iterable[int] | slice | Callable[[int], bool] | None = None
) -> None:
    """Set the rule by which layers of a model attend, in place and in its config.

    `pattern`: "local:128 | global:1", "global:1:1" (the first and the last token), "longformer", "big_bird", a list
    with one pattern per head, or a kernel mixer: "linear", "efficient", "performer:256", "rfa:128"; see `parse_rule`.
    None restores the model's own attention. `layers`: their numbers, a slice, or a function of the number; None means
    all. A rule replaces a layer's own window, but neither causality nor padding. Kernel mixers ignore attention
    dropout.
    Raises ValueError for a model that does not dispatch through transformers' attention interface, for an
    encoder-decoder, and for a rule that the model cannot compute.
    """
    check_model(model)
    config = model.config.get_text_config()
    causal, count = is_causal_model(model), config.num_hidden_layers
    chosen = chosen_layers(layers, count)
    if pattern is not None:
        check_spec(pattern, causal, config.num_attention_heads)
    spec = pattern if pattern is None or isinstance(pattern, str) else list(pattern)
    before = config.efficient_attention
    rules = [None] * count if before is None else list(specs_of_layers(before, count))
    for layer in chosen:
        rules[layer] = spec
    if all(rule == rules[0] for rule in rules):
        stored = None if rules[0] is None else {"pattern": rules[0]}
    else:
        check_numbered(model)
        stored = {"layers": rules}
    if model.config is not config:
        model.config.__dict__.pop("attn_implementation", None)
        if stored is not None:
            model.config.__dict__["attn_implementation"] = KEY
    config.efficient_attention = stored
    model.set_attn_implementation(KEY)


def chosen_layers(layers: Iterable[int] | slice | Callable[[int], bool] | None, count: int) -> list[int]:
    """Layer numbers, ascending. Raises ValueError for a layer that does not exist."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, slice):
        return list(range(count))[layers]
    if callable(layers):
        return [layer for layer in range(count) if layers(layer)]
    chosen = list(layers)
    for layer in chosen:
        if not -count <= layer < count:
            raise ValueError(f"layers contains {layer}, but the layers of the model are numbered 0 to {count - 1}.")
    return sorted({layer % count for layer in chosen})


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules that call the attention interface, with their names."""
    for name, module in model.named_modules():
        if "get_interface" in getattr(inspect.unwrap(type(module).forward), "__code__", NO_CODE).co_names:
            yield name, module


def is_causal_model(model: PreTrainedModel) -> bool:
    """True if the layers attend to the past only."""
    asked = getattr(model.config.get_text_config(), "is_causal", True)
    return asked and any(getattr(module, "is_causal", True) for _, module in attention_modules(model))


def check_interface(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose attention cannot be replaced."""
    if not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot be replaced"
            + alternative(model.config.model_type)
        )


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that does not support rules."""
    check_interface(model)
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} has cross-attention, for which no rule is defined: set_attention supports only "
            'encoders and decoders. attn_implementation="efficient" works without a rule.'
        )


def alternative(model_type: str) -> str:
    from ..conversion import SOURCES

    if model_type in SOURCES:
        return f": efficient_transformers.convert turns a {model_type} checkpoint into a variant with these patterns."
    return "."


def check_numbered(model: PreTrainedModel) -> None:
    """Raise ValueError if the attention modules do not have the number of their layer."""
    for name, module in attention_modules(model):
        if getattr(module, "layer_idx", None) is None:
            raise ValueError(
                f"{name} ({type(module).__name__}) has no layer_idx, so the layers of this model cannot have different "
                "rules: omit layers."
            )
