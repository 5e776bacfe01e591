"""Small configs of every variant, and what the tests share to look at a model from outside."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from efficient_transformers import VARIANTS, AttentionPattern, Variant
from efficient_transformers.models.base_configuration import PatternConfig

# What a config raises: a rule of its own, a name that no field has, a value of the wrong type
ConfigRefused = (ValueError, TypeError, StrictDataclassError)

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 38,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    # large enough for attention to matter: with the usual 0.02 every mixer is nearly the identity
    "initializer_range": 0.3,
}
# Several settings per variant, so that every branch of it meets every law. Sizes divide no test length.
SETTINGS: dict[str, list[dict]] = {
    "full": [
        {},
        {"norm_first": False, "position_embedding_type": "sinusoidal"},
        {"norm_first": False, "embedding_size": 14},
    ],
    "local": [
        {"window_size": 3, "position_embedding_type": "rotary"},
        {"window_size": [2, 70], "embedding_size": 14, "position_embedding_type": "sinusoidal"},
        {"window_size": 3, "reversible": True},
    ],
    "stride": [{"stride": 5, "hops": None}, {"stride": 3, "hops": 2, "position_embedding_type": "none"}],
    "global": [{"num_global_tokens": 2}, {"num_global_tokens": 3, "global_token_type": "external"}],
    "mixed": [
        {"head_patterns": ["local:3", "stride:4:2", "global:2", "random:2:8"]},
        {"head_patterns": ["local:2 | global:1", "full"], "type_vocab_size": 0},
        {"head_patterns": ["blocks:2:8", "blocks:0:7 | global:2"]},
    ],
    "longformer": [
        {"attention_window": 6, "num_global_tokens": 1},
        {"attention_window": [4, 20], "attention_dilation": [[1, 2, 3, 2], [1] * 4], "num_global_tokens": 2},
        {"attention_window": 6, "head_layout": "per_head", "stride": 5, "position_embedding_type": "rotary"},
        {"attention_window": 6, "num_global_tokens": 2, "position_embedding_type": "rotary"},
    ],
    "big_bird": [
        {"block_size": 4, "num_random_blocks": 2},
        {"block_size": 5, "global_token_type": "external", "num_global_tokens": 3},
        {"block_size": 4, "random_blocks": "stored"},
        {"block_size": 4, "head_layout": "per_head", "stride": 5},
    ],
    "reformer": [
        {"lsh_chunk_length": 6, "num_hashes": 2},
        {"lsh_chunk_length": 3, "num_hashes": 3, "num_buckets": [2, 4], "reversible": False},
        {"lsh_chunk_length": 7, "num_buckets": 4, "attend_across_buckets": True, "position_embedding_type": "rotary"},
        {"num_buckets": 1},
    ],
    "routing": [
        {"num_clusters": 4, "window_size": 3},
        {"num_clusters": 1, "local_heads": 4, "window_size": 3},
        {"num_clusters": 5, "local_heads": 0, "cluster_size": 6, "position_embedding_type": "rotary"},
    ],
    "sinkhorn": [
        {"block_size": 7},
        {"block_size": 5, "sortcut_blocks": 3},
        {"block_size": 16, "position_embedding_type": "rotary", "norm_first": False, "sinkhorn_iterations": 3},
    ],
    "linformer": [
        {"projected_length": 11},
        {"projected_length": 16, "projection_sharing": "none", "norm_first": False},
        {"projected_length": 7, "projection_sharing": "headwise"},
        {"projected_length": 13, "projection_sharing": "layerwise", "position_embedding_type": "rotary"},
        {"projected_length": 9, "projection_sharing": "layerwise", "reversible": True},
    ],
    "compressed": [
        {"attention_layers": ["compressed", "local"], "compression_factor": 3, "block_size": 16},
        {"block_size": 7, "norm_first": False},
        {"attention_layers": ["compressed"], "compression_factor": 4, "kernel_size": 7},
        {"attention_layers": ["compressed"], "kernel_size": 13, "position_embedding_type": "rotary"},
    ],
    "synthesizer": [
        {"synthesizer_type": "random"},
        {"synthesizer_type": "dense", "norm_first": False},
        {"synthesizer_type": "factorized_random", "factor_rank": 3},
        {"synthesizer_type": "factorized_dense", "dense_period": 9},
        {"synthesizer_type": "random+vanilla", "position_embedding_type": "rotary"},
        {"synthesizer_type": "fixed+dense+factorized_dense"},
        {"synthesizer_type": "vanilla+factorized_random"},
    ],
    "efficient": [{"position_embedding_type": "rotary"}],
    "linear": [{}, {"reversible": True}],
    "rfa": [{"num_random_features": 16}, {"num_random_features": 11, "position_embedding_type": "rotary"}],
    "performer": [{"num_random_features": 20}, {"num_random_features": 7, "kernel": "relu"}],
    "gmlp": [
        {},
        {"intermediate_size": 26, "tiny_attention_size": 11, "position_embedding_type": "learned"},
        {"norm_first": False},
    ],
    "mlp_mixer": [
        {"token_mixing_size": 13},
        {"token_mixing_size": 70, "norm_first": False, "position_embedding_type": "sinusoidal"},
        {"token_mixing_size": 21, "reversible": True},
    ],
    "fnet": [{}, {"embedding_projection": True, "hidden_act": "gelu_new"}, {"norm_first": True}],
}
CASES = [(VARIANTS[slug], settings) for slug, all_settings in SETTINGS.items() for settings in all_settings]
# for the ids of tests, one of each setting, in the order of SETTINGS
SETTING_NAMES = {
    "full": ["default", "post_norm", "embedding_size"],
    "local": ["rotary", "window_per_layer", "reversible"],
    "stride": ["unlimited", "two_hops"],
    "global": ["first_tokens", "external_tokens"],
    "mixed": ["four_patterns", "unions", "blocks"],
    "longformer": ["learned", "dilated", "per_head", "rotary"],
    "big_bird": ["drawn_blocks", "external_tokens", "stored_blocks", "per_head"],
    "reformer": ["two_hashes", "two_bucket_factors", "across_buckets", "one_bucket"],
    "routing": ["local_and_routing_heads", "local_heads", "routing_heads"],
    "sinkhorn": ["default", "sortcut", "rotary"],
    "linformer": ["shared", "unshared", "headwise", "layerwise", "layerwise_reversible"],
    "compressed": ["compressed_and_local", "default", "compressed_only", "rotary"],
    "synthesizer": [
        "random",
        "dense",
        "factorized_random",
        "factorized_dense",
        "random_vanilla",
        "fixed_dense_factorized",
        "vanilla_factorized",
    ],
    "efficient": ["rotary"],
    "linear": ["default", "reversible"],
    "rfa": ["default", "rotary"],
    "performer": ["softmax", "relu"],
    "gmlp": ["default", "tiny_attention", "post_norm"],
    "mlp_mixer": ["default", "post_norm", "reversible"],
    "fnet": ["default", "projected_embeddings", "pre_norm"],
}
IDS = [
    f"{slug}-{name}"
    for slug, all_settings in SETTINGS.items()
    for _, name in zip(all_settings, SETTING_NAMES[slug], strict=True)
]


def can_be_causal(variant: Variant, settings: dict) -> bool:
    encoders_only = {"sortcut_blocks", "attend_across_buckets", "anchor_interval"}
    return variant.causal and settings.get("global_token_type") != "external" and not settings.keys() & encoders_only


CAUSAL = [(case, case_id) for case, case_id in zip(CASES, IDS, strict=True) if can_be_causal(*case)]
# every case as an encoder, and those that can as decoders
MODES = [pytest.param(*case, False, id=f"{name}-encoder") for case, name in zip(CASES, IDS, strict=True)]
MODES += [pytest.param(*case, True, id=f"{name}-causal") for case, name in CAUSAL]


def is_first(mode) -> bool:
    """True if an entry of MODES has the first settings of its variant."""
    variant, settings, _ = mode.values
    return settings is SETTINGS[variant.slug][0]


def config(variant: Variant, settings: dict, **changes):
    return variant.config_class(**{**SMALL, **settings, **changes})


IMAGE = {"image_size": [14, 10], "patch_size": 2, "num_channels": 3}


def for_head(head: str | None) -> dict:
    """Fields that a head asks for."""
    return IMAGE if head == "ImageClassification" else {}


def build(variant: Variant, settings: dict, head: str | None = None, **changes):
    """A small model in eval mode, in float64 unless told otherwise."""
    dtype = changes.pop("dtype", torch.float64)
    return variant.model_class(head)(config(variant, settings, **{**for_head(head), **changes})).to(dtype).eval()


def one_layer(settings: dict) -> dict:
    """The settings of the first layer alone, where they are given for each."""
    fields = {
        name: value[:1]
        for name, value in settings.items()
        if isinstance(value, list) and name not in ("head_patterns", "num_buckets")
    }
    return {"num_hidden_layers": 1, **fields}


def inputs(batch: int, length: int, vocab_size: int = 99) -> Tensor:
    return torch.randint(1, vocab_size, (batch, length))


def pack_rows(*rows: list[Tensor], width: int) -> dict[str, Tensor]:
    """What a model gets of rows of documents (1, n), padded on the right to `width` tokens."""
    padded = torch.zeros(3, len(rows), width, dtype=torch.long)
    for number, documents in enumerate(rows):
        ids = torch.cat(documents, 1)[0]
        positions = torch.cat([torch.arange(document.shape[1]) for document in documents])
        padded[:, number, : len(ids)] = torch.stack([ids, torch.ones_like(ids), positions])
    return dict(zip(("input_ids", "attention_mask", "position_ids"), padded, strict=True))


def inputs_of(model, batch: int, length: int) -> Tensor:
    """What a model with any head reads: token ids, for each of two choices, or images."""
    if model.main_input_name == "pixel_values":
        cfg = model.config
        return torch.randn(batch, cfg.num_channels, *cfg.image_size, dtype=model.dtype)
    if type(model).__name__.endswith("MultipleChoice"):
        return inputs(2 * batch, length).view(batch, 2, length)
    return inputs(batch, length)


def bytes_kept(run, parameters=()) -> int:
    """Bytes that autograd keeps for the backward pass of what `run` returns, less the parameters."""
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = run()  # alive until all is counted: memory that is given back is given out again
    held = {p.untyped_storage().data_ptr() for p in parameters}
    assert output is not None
    return sum(size for pointer, size in sizes.items() if pointer not in held)


def used_parameters(model) -> list[torch.nn.Parameter]:
    """Those that the hidden states depend on."""
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("pooler")]


def gradients_in_both_precisions(model, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """All gradients of the loss as one vector, in the precision of the model and by autocast to bfloat16."""
    grads = []
    for mixed in (False, True):
        model.zero_grad()
        torch.manual_seed(2)  # the same noise for those that draw it
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            loss = model(ids, labels=labels).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return grads


def probed(hidden: Tensor) -> Tensor:
    """Hidden states times a fixed random tensor, summed: for gradients. Of vectors behind a norm the sum of squares is
    a constant, and its gradient nothing but rounding."""
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (hidden * probe.to(hidden)).sum()


def readable(model, embeds: Tensor) -> Tensor:
    """(n, n) bool: does output i depend on `embeds` (1, n, e) at j? By gradients, so no formula is trusted."""
    length = embeds.shape[1]
    embeds = embeds.detach().requires_grad_()
    output = model(inputs_embeds=embeds).last_hidden_state[0]
    # a random projection of each output: the sum over features of a normalised vector has no gradient
    probe = torch.randn(output.shape[-1], dtype=output.dtype)
    rows = [torch.autograd.grad(output[i] @ probe, embeds, retain_graph=True)[0][0] for i in range(length)]
    return torch.stack(rows).abs().sum(-1) > 0


every_case = pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
every_causal_case = pytest.mark.parametrize(
    ("variant", "settings"), [case for case, _ in CAUSAL], ids=[name for _, name in CAUSAL]
)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
every_head = pytest.mark.parametrize(
    ("variant", "head"), [(v, h) for v in VARIANTS.values() for h in v.heads], ids=lambda x: getattr(x, "slug", x)
)


# 7 · cost follows the law --------------------------------------------------------------------------------------------


def kernel_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """torch's counter knows the CUDA kernels of scaled_dot_product_attention and not the one for CPUs."""
    batch, heads, length, dim = q_shape
    return 2 * batch * heads * length * k_shape[2] * (dim + v_shape[3])


def counted_flops(model, length: int) -> int:
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: kernel_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(inputs(1, length))
    return counter.get_total_flops()


def labels_for(model, ids):
    name = type(model).__name__
    if name.endswith(("MaskedLM", "CausalLM")):
        return {"labels": ids}
    if name.endswith("TokenClassification"):
        return {"labels": ids % 2}
    labels = torch.arange(len(ids)) % 2
    if name.endswith("QuestionAnswering"):
        return {"start_positions": 0 * labels, "end_positions": 0 * labels}
    return {"labels": labels}


def patterns_of(cfg, layer: int) -> list[AttentionPattern]:
    """Who reads whom; through a feature map everybody reads everything."""
    if isinstance(cfg, PatternConfig):
        return cfg.attention_patterns(layer)
    return [AttentionPattern(window=None, causal=cfg.is_decoder)]


def loss_of(model, head: str, length: int = 60):
    if head == "ImageClassification":
        return model(inputs_of(model, 3, length), labels=torch.tensor([0, 1, 1])).loss
    ids = inputs(3, length)
    types = {"token_type_ids": torch.randint(0, 2, ids.shape)} if model.config.type_vocab_size else {}
    match head:
        case "MaskedLM" | "CausalLM":
            # every position there is, so that learned positions have a gradient
            ids = inputs(3, model.config.max_position_embeddings)
            types = {name: torch.randint(0, 2, ids.shape) for name in types}
            return model(ids, labels=inputs(*ids.shape), **types).loss
        case "SequenceClassification":
            labels = {"labels": torch.tensor([0, 1, 1])}
        case "TokenClassification":
            labels = {"labels": torch.randint(0, 2, ids.shape)}
        case "QuestionAnswering":
            labels = {"start_positions": torch.tensor([3, 0, 7]), "end_positions": torch.tensor([4, 9, 7])}
        case "MultipleChoice":
            ids = inputs(6, length).view(3, 2, length)
            types = {name: torch.randint(0, 2, ids.shape) for name in types}
            return model(ids, labels=torch.tensor([0, 1, 1]), **types).loss
    every = model.config.max_position_embeddings
    ids = inputs(3, every)
    if head == "TokenClassification":
        labels = {"labels": torch.randint(0, 2, ids.shape)}
    types = {name: torch.randint(0, 2, ids.shape) for name in types}
    return model(ids, **labels, **types).loss
