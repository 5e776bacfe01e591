"""What the cache of every causal variant holds: the past under a mask of the new tokens, and nothing after a reset."""

import pytest
import torch
import zoo
from written_out import EXACT, PIECES, build, in_pieces, rows

from efficient_transformers import VARIANTS

# short windows, blocks and chunks, so that caches forget and fill blocks within a few tokens
SETTINGS = {
    "full": [{}, {"position_embedding_type": "rotary"}],
    "local": [{"window_size": 2}],
    "stride": [{"stride": 3, "hops": 2}, {"stride": 3, "hops": None}],
    "global": [{"num_global_tokens": 2}],
    "mixed": [{"head_patterns": ["local:2", "stride:3:2", "global:2", "random:1:4"]}],
    "longformer": [{"attention_window": 4, "num_global_tokens": 1}],
    "reformer": [{"lsh_chunk_length": 4}],
    "routing": [{"num_clusters": 3, "window_size": 2}],
    "sinkhorn": [{"block_size": 4}],
    "compressed": [{"compression_factor": 3, "block_size": 5}, {"kernel_size": 7, "attention_layers": ["compressed"]}],
    "synthesizer": [{"synthesizer_type": "random+vanilla"}, {"synthesizer_type": "dense"}],
    "efficient": [{}],
    "linear": [{}],
    "rfa": [{"num_random_features": 8}, {"num_random_features": 8, "gated": True}],
    "performer": [{"num_random_features": 8}],
    "gmlp": [{}, {"tiny_attention_size": 5}],
}
# a new variant is tested with its settings in zoo.py
SETTINGS |= {v.slug: zoo.SETTINGS[v.slug] for v in VARIANTS.values() if v.causal and v.slug not in SETTINGS}
CASES = [
    pytest.param(slug, fields, id=f"{slug}-{number}")
    for slug, settings in SETTINGS.items()
    for number, fields in enumerate(settings)
]
every_case = pytest.mark.parametrize(("slug", "fields"), CASES)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_every_causal_variant_is_here():
    assert set(SETTINGS) == {slug for slug, variant in VARIANTS.items() if variant.causal}


@every_case
@pytest.mark.parametrize("new", [1, 6])
def test_a_mask_of_the_new_tokens_leaves_the_past_visible(slug, fields, new):
    """A mask as long as the new tokens says nothing about those before: they were real."""
    model, ids = build(slug, is_decoder=True, **fields), rows()[0]
    seen = 11
    for padding in (0, 2)[: 1 + (new > 2)]:
        mask = torch.ones(len(ids), new, dtype=torch.long)
        mask[1, new - padding :] = 0
        mask[2, :padding] = 0
        cache = model(ids[:, :seen]).past_key_values
        continued = model(ids[:, seen : seen + new], mask, past_key_values=cache).last_hidden_state
        whole = torch.cat([torch.ones(len(ids), seen, dtype=torch.long), mask], 1)
        expected = model(ids[:, : seen + new], whole).last_hidden_state[:, seen:]
        torch.testing.assert_close(continued, expected, **EXACT)


@every_case
@pytest.mark.parametrize("steps", ["one", "several"])
def test_a_cache_that_is_reset_is_empty(slug, fields, steps):
    """It holds what a new one does, and then takes a batch of another size as a new one would."""
    model, (ids, mask) = build(slug, is_decoder=True, **fields), rows()
    cache = model(ids, mask).past_key_values
    if steps == "several":
        cache = None
        for token in range(20):
            cache = model(ids[:, token : token + 1], past_key_values=cache).past_key_values
    assert cache.get_seq_length() == (33 if steps == "one" else 20)
    cache.reset()
    assert cache.get_seq_length() == 0
    for layer, block in zip(cache.layers, model.layers, strict=True):
        assert layer.num_rows == 0
        assert held(layer) == held(block.mixer.new_cache_layer())
    others = ids.flip(0, 1)[:3]
    expected = model(others).last_hidden_state
    torch.testing.assert_close(in_pieces(model, others, cache=cache), expected, **EXACT)
    assert cache.get_seq_length() == PIECES[-1]


def held(layer) -> dict:
    """The attributes of a cache layer; transformers notes its dtype and device with the first tokens."""
    return {name: value for name, value in vars(layer).items() if name not in ("dtype", "device")}
