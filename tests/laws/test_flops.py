"""FLOPs in costs.py against a counter, and how FLOPs and memory grow with the length."""

import pytest
import torch
from zoo import MODES, build, bytes_kept, config, counted_flops, every_case, inputs, patterns_of

from efficient_transformers import VARIANTS, costs

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
@pytest.mark.parametrize("length", [61, 128])
def test_counted_flops_equal_costs(variant, settings, length, decoder):
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, is_decoder=decoder, use_cache=False)
    assert counted_flops(model, length) == costs.forward_flops(model, length)


@every_case
def test_the_pairs_in_costs_are_those_of_the_mask(variant, settings):
    cfg = config(variant, settings)
    for layer in range(2):
        for pattern in patterns_of(cfg, layer):
            for length in (1, 30, 61):
                assert costs.pairs(pattern, length) == pattern.dense(length).sum().item()


@pytest.mark.parametrize(
    ("slug", "fields", "most"),
    [
        # doubling the length doubles the cost of a window, of some hops, of some global tokens
        ("local", {"window_size": 64}, 2.1),
        ("stride", {"stride": 64, "hops": 2}, 2.1),
        ("global", {"num_global_tokens": 2}, 2.1),
        ("mixed", {"head_patterns": ["local:64", "stride:64:2", "global:2", "random:2"]}, 2.1),
    ],
)
def test_attention_flops_grow_linearly(slug, fields, most):
    cfg = config(VARIANTS[slug], fields, max_position_embeddings=32768)
    short, long = (costs.attention_flops(cfg, length) for length in (8192, 16384))
    assert 1.8 * short < long < most * short
    full = config(VARIANTS["full"], {}, max_position_embeddings=32768)
    assert long < costs.attention_flops(full, 16384) / 10


def test_half_the_window_is_half_the_work():
    narrow, wide = (
        costs.attention_flops(config(VARIANTS["local"], {"window_size": w}, max_position_embeddings=4096), 4096)
        for w in (64, 128)
    )
    assert narrow < 0.61 * wide  # tiles of 64 queries read 192 keys and 320


@pytest.mark.parametrize("slug", ["local", "stride", "global", "mixed", "reformer", "routing", "sinkhorn"])
def test_memory_for_the_backward_grows_linearly(slug):
    """Bytes that autograd keeps: twice the length, twice the bytes; an N×N tensor would make it four times."""
    fields = {"hops": 2} if slug == "stride" else {}
    model = build(VARIANTS[slug], {**fields}, dtype=torch.float32, max_position_embeddings=4096)
    kept = [bytes_kept(lambda n=n: model(inputs(1, n)).last_hidden_state, model.parameters()) for n in (1024, 2048)]
    assert kept[1] < 2.2 * kept[0]
