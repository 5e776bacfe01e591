"""Run every text architecture of transformers that can be built tiny from its config, and compare it with SDPA."""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from inspect import signature
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from efficient_transformers.any_model import attention, masks

LENGTH, WINDOW, VOCABULARY = 40, 6, 99
# Sizes by the names that configs use for them; each is passed only to a config that has the field.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "emb_dim": 32, "n_inner": 64, "word_embed_proj_dim": 32, "hidden_dim": 64, "ffn_dim": 64, "d_ff": 64, "d_kv": 8,
    "intermediate_size": 64, "dense_intermediate_size": 64, "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64, "block_ff_dim": 64,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "global_head_dim": 8, "attention_head_dim": 8,
    "kv_channels": 8, "attention_hidden_size": 32, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "max_sequence_length": 256, "max_seq_len": 256, "type_vocab_size": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_num_experts": 4, "moe_k": 2, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "sliding_window": WINDOW, "local_attention": 2 * WINDOW,
    "use_sliding_window": True, "max_window_layers": 2, "sliding_window_pattern": 2, "global_attn_every_n_layers": 2,
    "attention_chunk_size": WINDOW, "initializer_range": 0.1, "init_std": 0.1, "initializer_factor": 1.0,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
    "num_kv_shared_layers": 0, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32, "block_size": 8, "num_mem_blocks": 1,
    "rotary_dim": 8, "output_router_logits": False, "true_hidden_size": 32, "intra_bottleneck_size": 32,
    "embedding_dim": 32, "rotary_pct": 1.0, "ngram": 2, "num_buckets": 8,
}  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
# Additional fields for configs whose fields depend on each other: multi-latent attention shares no keys.
MULTI_LATENT = (
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "esmc",
    "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "mistral4", "youtu",
)  # fmt: skip
SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "initializer_range": 0.02,
}
ALSO: dict[str, dict] = {kind: {"num_key_value_heads": 4} for kind in MULTI_LATENT} | {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}
# Older versions of these ignore the padding when SDPA receives a boolean mask.
CHOOSE_KEYS = ("deepseek_v32", "glm_moe_dsa")
# The float32 rounding errors of these exceed the tolerance, also between SDPA's own kernels.
IN_FLOAT64 = ("gemma4_text", "gemma4_unified_text")
TOLERANCE = 1e-5
LARGEST = 3_000_000  # parameters


@cache
def text_types() -> tuple[str, ...]:
    """Model types with a class for language modelling, including encoder-decoders."""
    names = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
             "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES")  # fmt: skip
    found = {kind for name in names for kind in getattr(modeling_auto, name, {})}
    known = modeling_auto.MODEL_MAPPING_NAMES
    found = {kind for kind in found if kind in known and not kind.startswith("et_")}
    return tuple(sorted(kind for kind in found if "input_ids" in signature(model_class_of(kind).forward).parameters))


def model_class_of(kind: str) -> type[PreTrainedModel]:
    """The bare model class of a type."""
    found = transformers.AutoModel._model_mapping[CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[reportReturnType]


def tiny_config(kind: str) -> PreTrainedConfig:
    """The smallest config of a type that still has sliding windows if the architecture has them."""
    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in fields(config_class)}
    known |= set(getattr(config_class, "attribute_map", {}))
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = config_class(**{**sizes, **ALSO.get(kind, {})})
    for name in TOKENS:
        if isinstance(getattr(config, name, None), int) and not 0 <= getattr(config, name) < VOCABULARY:
            setattr(config, name, 1)
    return config


def tiny_model(kind: str, implementation: str | None = "sdpa") -> PreTrainedModel:
    """The bare model of a type, in float32. Raises any error of its constructor."""
    config = tiny_config(kind)
    model_class = model_class_of(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size:,} parameters, more than {LARGEST:,}.")
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=implementation).eval()


# --- comparison


@dataclass
class Outcome:
    """Result of one architecture with `attn_implementation="efficient"`.

    word: "tiled", "by rows" (SDPA row by row, without padding), "passed on", "refused" or "no attention". reasons: why
    layers were passed on. error: largest difference from `reference` relative to the largest output.
    """

    word: str
    reference: str = ""
    reasons: tuple[str, ...] = ()
    error: float = 0.0


def inputs_of(model: PreTrainedModel, padding: str | None, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random tokens for two rows; with padding ("left" or "right"), the first row is shorter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, length - 7), generator=generator)
    if padding is not None:
        mask = torch.ones_like(ids)
        mask[0, -9:] = 0
        inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
    return inputs


def real_outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of the tokens that are not padding, (tokens, hidden)."""
    out = model(**inputs)
    hidden = out.last_hidden_state if "last_hidden_state" in out else out[0]
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.flatten(0, 1)
    return hidden[mask.bool()]


def reference_model(kind: str) -> PreTrainedModel:
    """The model with SDPA, or with eager attention if it does not support SDPA."""
    try:
        return tiny_model(kind, "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return tiny_model(kind, "eager")


def usable_model(kind: str) -> PreTrainedModel:
    """`reference_model` after one forward pass. Raises any error of the model."""
    model = reference_model(kind)
    with torch.no_grad():
        real_outputs(model, inputs_of(model, None))
    return model


def paddings(model: PreTrainedModel) -> list[str | None]:
    if model.config.model_type in CHOOSE_KEYS and Version(transformers.__version__) < Version("5.23"):
        return [None]
    return [None, "right", *(["left"] if can_generate(model) else [])]


def can_generate(model: PreTrainedModel) -> bool:
    return type(model.config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not model.config.is_encoder_decoder


class Watch(logging.Handler):
    """Count the calls of engines, and collect the reasons why layers were passed on."""

    def __init__(self):
        super().__init__()
        self.calls, self.reasons = Counter(), set()

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.add(record.getMessage().partition("because ")[2].rstrip("."))

    def __enter__(self):
        self.restore = attention.pattern_attention, attention.by_chunks, attention.pass_on, masks.SHORT_LENGTH
        masks.SHORT_LENGTH = 0  # every mask counts as long

        def counted(name, function):
            def call(*args, **kwargs):
                self.calls[name] += 1
                return function(*args, **kwargs)

            return call

        def pattern_attention(q, k, v, lengths, rule, dropout):
            self.calls["by rows" if rule.pattern.is_full else "tiled"] += 1
            return self.restore[0](q, k, v, lengths, rule, dropout)

        attention.pattern_attention = pattern_attention
        attention.by_chunks = counted("tiled", attention.by_chunks)
        attention.pass_on = counted("passed on", attention.pass_on)
        for logger in (attention.logger, masks.logger):
            logger.addHandler(self)
        cache_clear = getattr(type(attention.logger).warning_once, "cache_clear", None)
        if cache_clear is not None:
            cache_clear()
        return self

    def __exit__(self, *_):
        attention.pattern_attention, attention.by_chunks, attention.pass_on, masks.SHORT_LENGTH = self.restore
        for logger in (attention.logger, masks.logger):
            logger.removeHandler(self)


def compare(kind: str, gradients: bool = True, dtype: torch.dtype = torch.float32) -> Outcome:
    """Compare outputs, and gradients of one step, of "efficient" with the reference, for every supported padding."""
    model = reference_model(kind).to(dtype=dtype)  # type: ignore[reportArgumentType]
    reference = model.config._attn_implementation or "eager"
    if not type(model)._can_set_attn_implementation():
        return Outcome("refused", reference)
    real_outputs(model, inputs_of(model, None))  # BigBird-Pegasus replaces its layers in its first pass
    error = 0.0
    with Watch() as watch:
        for padding in paddings(model):
            inputs = inputs_of(model, padding)
            found = []
            for implementation in (reference, "efficient"):
                model.set_attn_implementation(implementation)
                model.zero_grad()
                torch.manual_seed(2)
                with torch.set_grad_enabled(gradients):
                    out = real_outputs(model, inputs)
                values = [out.detach()]
                if gradients and out.requires_grad:
                    (out * torch.randn_like(out)).sum().backward()
                    values += [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append(values)
            expected, actual = found
            assert len(expected) == len(actual), f"{kind}: the sets of parameters with a gradient differ"
            error = max(error, relative_error(actual[:1], expected[:1]), relative_error(actual[1:], expected[1:]))
    word = next((w for w in ("tiled", "by rows", "passed on") if watch.calls[w]), "no attention")
    return Outcome(word, reference, tuple(sorted(watch.reasons)), error)


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference of any tensor relative to its largest value, or to 1 % of the largest of all if that is
    larger.

    Gradients of key biases are zero in exact arithmetic, so their rounding errors must not be compared with themselves.
    """
    if not all(bool(torch.isfinite(x).all()) for x in expected):
        raise ValueError("the reference is not finite.")
    largest = [float(x.abs().max()) if x.numel() else 0.0 for x in expected]
    floor = 0.01 * max(largest, default=0.0)
    errors = [0.0]
    for x, y, scale in zip(actual, expected, largest, strict=True):
        difference = float((x - y).abs().max()) if x.numel() else 0.0
        errors.append(difference / max(scale, floor, 1e-30) if difference == difference else float("inf"))
    return max(errors)


# --- the page

WORDS = {
    "tiled": "Sliding windows run through the tiled engine; full attention runs through SDPA.",
    "by rows": "Full or causal attention through SDPA; rows of unequal lengths one by one, without a mask.",
    "passed on": "All layers need what no engine has, and run through SDPA or the model's own eager attention.",
    "refused": "The architecture does not use transformers' attention interface; `set_attention` raises ValueError.",
    "no attention": "The architecture has no attention layers.",
}  # fmt: skip


def page(kinds: Sequence[str]) -> str:
    """The text of docs/architectures.md."""
    found: dict[str, Outcome] = {}
    unbuilt: list[str] = []
    for kind in kinds:
        try:
            usable_model(kind)
        except Exception:  # any error of a constructor or a forward pass
            unbuilt.append(kind)
        else:
            found[kind] = compare(kind, dtype=torch.float64 if kind in IN_FLOAT64 else torch.float32)
    wrong = [kind for kind, outcome in found.items() if outcome.error > TOLERANCE]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} differ from the reference.")
    counts = Counter(outcome.word for outcome in found.values())
    lines = [
        '# Architectures under `attn_implementation="efficient"`',
        "",
        "Written by `python benchmarks/architectures.py` and checked by `tests/any_model`: every text",
        f"architecture of transformers {transformers.__version__} that can be built tiny from its config and runs, "
        f"{len(found)} of {len(kinds)},",
        "with random weights. Outputs, and gradients of one step, equal those of the reference within 0.00001 of their",
        "largest value: without a mask, with right padding, and for decoders with left padding.",
        "",
        *(f"- **{word}** ({counts[word]}): {text}" for word, text in WORDS.items()),
        "",
        "| architecture | outcome | compared with | why layers are passed on |",
        "|---|---|---|---|",
    ]
    for kind, outcome in found.items():
        reasons = "; ".join(outcome.reasons)
        lines.append(f"| `{kind}` | {outcome.word} | {outcome.reference} | {reasons} |")
    lines += ["", f"Not built tiny, mostly models of several modalities: {', '.join(f'`{kind}`' for kind in unbuilt)}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"), help="page to write")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    logging.getLogger("efficient_transformers").propagate = False
    options.out.write_text(page(text_types()), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
