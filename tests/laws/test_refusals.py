"""Configs and inputs that are refused, and what the errors say."""

import pytest
import torch
from zoo import ConfigRefused, build, config, inputs

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.parametrize(
    ("slug", "fields", "message"),
    [
        ("full", {"hidden_size": 30}, "hidden_size.*must be a multiple of num_attention_heads.*change either"),
        ("full", {"num_attention_heads": 0}, r"num_attention_heads \(0\) must be at least 1"),
        ("full", {"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob \(1.0\) must lie in \[0, 1\)"),
        ("full", {"hidden_size": "32"}, "hidden_size"),
        ("full", {"embedding_size": 0}, r"embedding_size \(0\) must be at least 1: None embeds in hidden_size"),
        ("full", {"embedding_size": 7, "position_embedding_type": "sinusoidal"}, r"embedding_size \(7\) must be a"),
        ("full", {"hiden_size": 32}, "no field 'hiden_size'; did you mean 'hidden_size'"),
        ("full", {"position_embedding_type": "rotatory"}, "position_embedding_type"),
        ("full", {"hidden_size": 12, "position_embedding_type": "rotary"}, r"head_dim \(3\) must be a multiple of 2"),
        ("local", {"window_size": 0}, r"window_size \(0\) must be at least 1"),
        ("local", {"window_size": -4}, r"window_size \(-4\) must be at least 1"),
        ("local", {"widnow_size": 8}, "did you mean 'window_size'"),
        ("local", {"window_size": [3, 4, 5]}, "window_size has 3 entries and num_hidden_layers is 2"),
        ("stride", {"stride": 0}, r"stride \(0\) must be at least 1"),
        ("stride", {"hops": 0}, r"hops \(0\) must be at least 1.*None to all"),
        ("global", {"num_global_tokens": -1}, r"num_global_tokens \(-1\) must be at least 0"),
        ("global", {"global_token_type": "external", "is_decoder": True}, "'external' cannot be causal"),
        ("mixed", {"head_patterns": ["near:3"]}, "'near:3'.* is no attention pattern"),
        ("mixed", {"head_patterns": ["local:3"] * 3}, "cannot be tiled over num_attention_heads"),
        ("mixed", {"head_patterns": []}, "cannot be tiled"),
        ("sinkhorn", {"block_size": 0}, r"block_size \(0\) must be at least 1"),
        ("sinkhorn", {"sinkhorn_iterations": -1}, r"sinkhorn_iterations \(-1\) must be at least 0"),
        ("sinkhorn", {"sinkhorn_temperature": 0}, r"sinkhorn_temperature \(0\) must be above 0"),
        ("sinkhorn", {"sortcut_blocks": 0}, r"sortcut_blocks \(0\) must be at least 1"),
        ("sinkhorn", {"sortcut_blocks": 2, "is_decoder": True}, r"sortcut_blocks \(2\) cannot be causal"),
        ("linear", {"attention_probs_dropout_prob": 0.1}, r"attention_probs_dropout_prob \(0.1\) must be 0"),
        ("rfa", {"num_random_features": 0}, r"num_random_features \(0\) must be at least 1"),
        ("performer", {"feature_redraw_interval": 0}, r"feature_redraw_interval \(0\) must be at least 1: None never"),
        ("performer", {"kernel": "cosine"}, "kernel"),
    ],
)
def test_bad_configs_are_refused(slug, fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(VARIANTS[slug], fields)


def test_strangers_in_a_config_are_kept():
    assert config(VARIANTS["local"], {"my_note": "kept", "num_labels": 3}).my_note == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict, "either input_ids or inputs_embeds"),
        (lambda: {"input_ids": inputs(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "not both and not neither"),
        (lambda: {"inputs_embeds": torch.zeros(1, 4, 30)}, r"width of embeddings\) = \(1, 4, 32\), got \(1, 4, 30\)"),
        (
            lambda: {"input_ids": inputs(2, 4), "attention_mask": torch.ones(2, 5)},
            r"attention_mask must have shape .* = \(2, 4\), got \(2, 5\)",
        ),
        (
            lambda: {"input_ids": inputs(2, 4), "global_attention_mask": torch.ones(2, 4)},
            "takes no global_attention_mask",
        ),
        (lambda: packed_pair(output_attentions=True), "output_attentions cannot go with packed rows.*into 2 documents"),
        (lambda: packed_pair(attention_mask=torch.ones(1, 9)), r"attention_mask must have shape .* = \(1, 8\)"),
        (lambda: packed_pair(100, 140), "built for 128 positions and got 140"),
    ],
)
def test_bad_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(VARIANTS["local"], {}, dtype=torch.float32)(**arguments())


def packed_pair(*lengths: int, **more):
    lengths = lengths or (3, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": inputs(1, sum(lengths)), "position_ids": positions, **more}


def test_packed_rows_have_no_cache():
    model = build(VARIANTS["local"], {}, "CausalLM")
    assert model(**packed_pair()).past_key_values is None
    past = model(inputs(1, 4)).past_key_values
    for name, value in {"use_cache": True, "past_key_values": past}.items():
        with pytest.raises(ValueError, match=f"{name} cannot go with packed rows: position_ids start again at 0"):
            model(**packed_pair(), **{name: value})


def test_a_masked_model_cannot_be_causal():
    with pytest.raises(ValueError, match="is_decoder=True: set is_decoder=False, or use EtLocalForCausalLM"):
        build(VARIANTS["local"], {"is_decoder": True}, "MaskedLM")
