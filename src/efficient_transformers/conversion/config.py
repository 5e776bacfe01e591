"""The variant's config: the source's sizes and choices, fields that the pair shares, then the caller's fields."""

from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import check_fields, said
from ..models.base_kernel_attention import KernelConfig
from ..registry import Variant
from .layouts import SOURCES
from .rules import BLOCK_FIELDS, CHOICES, SHARED_FIELDS, SIZES, TRANSFORMERS_FIELDS


def make_config(
    variant: Variant,
    source_config: PreTrainedConfig,
    kept_head: str | None,
    length: int,
    tokenizer: Any,
    block_tables: Sequence[Tensor] | None,
    fields: dict[str, Any],
) -> Any:
    """Merge all fields. Raises ValueError for unknown fields, and for fields that the source's weights rule out."""
    own = own_fields(variant)
    of_blocks = block_fields(variant, own, block_tables, fields)
    check_fields(fields, own | TRANSFORMERS_FIELDS, variant.model_type)
    fixed = fixed_fields(source_config, kept_head, own)
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} ({fields[name]!r}) must be {value!r}, as the source's weights are: leave it out.")
    values = default_fields(variant, source_config, tokenizer, own)
    if not fields.keys() & {"num_labels", "id2label", "label2id"}:
        values |= {"id2label": source_config.id2label, "label2id": source_config.label2id}
    pooling = "last" if SOURCES[source_config.model_type].is_decoder else "cls"
    values |= {"classifier_pooling": pooling, "max_position_embeddings": length}
    values |= SHARED_FIELDS.get((source_config.model_type, variant.slug), lambda _: {})(source_config)
    values |= of_blocks
    try:
        return variant.config_class(**{**values, **fixed, **fields})
    except StrictDataclassError as error:
        raise ValueError(said(error)) from error


def own_fields(variant: Variant) -> set[str]:
    """Fields of the variant that transformers' base config does not have."""
    theirs = {entry.name for entry in fields_of(PreTrainedConfig)}
    return {entry.name for entry in fields_of(variant.config_class)} - theirs


def fields_of_source(source_config: PreTrainedConfig) -> dict[str, Any]:
    """The source's sizes and choices under the names of the fields here."""
    values = {name: getattr(source_config, name) for name in (*SIZES, *CHOICES) if hasattr(source_config, name)}
    return values | SOURCES[source_config.model_type].fields(source_config)


def fixed_fields(source_config: PreTrainedConfig, kept_head: str | None, own: set[str]) -> dict[str, Any]:
    """Fields that the source's weights determine."""
    source = SOURCES[source_config.model_type]
    theirs = fields_of_source(source_config)
    fixed = {**source.layout, **{name: theirs[name] for name in (*SIZES, *source.layout) if name in theirs}}
    if "pooler_act" in own:
        act = source.pooler_act.get(kept_head or "", "tanh")
        fixed["pooler_act"] = getattr(source_config, act, act) or "linear"
    if kept_head == "MaskedLM" and source.lm_act and theirs["hidden_act"] not in source.lm_act:
        raise ValueError(
            f"the source's hidden_act ({theirs['hidden_act']!r}) must be 'gelu', which its language model's head "
            "always uses: convert without that head (head='Model')."
        )
    if kept_head in ("MaskedLM", "CausalLM") and not source_config.tie_word_embeddings:
        fixed["tie_word_embeddings"] = False
    return fixed


def default_fields(variant: Variant, source_config: PreTrainedConfig, tokenizer: Any, own: set[str]) -> dict[str, Any]:
    """Choices of the source that the caller may change."""
    theirs = fields_of_source(source_config)
    values = {name: theirs[name] for name in CHOICES if name in theirs}
    if "sep_token_id" in own:
        of_tokenizer = getattr(tokenizer, "sep_token_id", None)
        values["sep_token_id"] = getattr(source_config, "sep_token_id", None) or of_tokenizer
    if issubclass(variant.config_class, KernelConfig) or not variant.attention:
        values.pop("attention_probs_dropout_prob", None)  # there is no matrix to drop from
    return values


def block_fields(
    variant: Variant, own: set[str], block_tables: Sequence[Tensor] | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that follow from the caller's tables of random blocks."""
    if block_tables is None:
        return {}
    if "random_blocks" not in own:
        raise ValueError(f"block_tables are the stored random blocks of 'big_bird': {variant.model_type} has none.")
    if fields["random_blocks"] != "stored":
        raise ValueError(f"random_blocks ({fields['random_blocks']!r}) must be 'stored' to take block_tables.")
    return {"num_random_blocks": block_tables[0].shape[-1]}


def reads_blocks(config: PreTrainedConfig, variant: str, fields: Mapping[str, Any]) -> bool:
    """Can the model be made to read what the source reads in eval mode, and is it not told to read anything else?"""
    sparse = config.model_type == variant == "big_bird" and config.attention_type == "block_sparse"
    return sparse and not fields.keys() & BLOCK_FIELDS and fields.get("random_blocks", "stored") == "stored"
