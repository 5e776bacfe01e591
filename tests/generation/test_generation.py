"""`generate` of transformers drives every causal variant; the cache says what the uncached forward says."""

import pytest
import torch
from transformers import DynamicCache
from zoo import CAUSAL, SETTINGS, build, every_causal_case, every_variant, inputs

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


def causal_model(variant, settings, **changes):
    return build(variant, settings, "CausalLM", **changes)


@every_causal_case
@torch.no_grad()
def test_pieces_and_steps_equal_the_whole(variant, settings):
    """Prefill in several pieces, then token by token, with left padding and a hole: the logits of one forward."""
    model = causal_model(variant, settings)
    ids, mask = inputs(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :32] = 0
    mask[1, 7:9] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, start = None, 0
    for size in (33, 1, 9, *[1] * 17):
        stop = start + size
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(output.logits[real], expected[:, start:stop][real], rtol=1e-9, atol=1e-9)
        start = stop
    assert cache.get_seq_length() == 60
    by_embedding = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    torch.testing.assert_close(by_embedding, expected)


@every_causal_case
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_k": 7}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampled", "beam"],
)
def test_generate_is_the_same_with_and_without_cache(variant, settings, how):
    model = causal_model(variant, settings)
    ids, mask = inputs(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=25, use_cache=use_cache, pad_token_id=0, output_scores=True,
                output_hidden_states=True, return_dict_in_generate=True, **how,
            )
        )  # fmt: skip
    cached, uncached = outputs
    assert cached.sequences.equal(uncached.sequences)
    for a, b in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert [step[0].shape[1] for step in cached.hidden_states] == [20] + [1] * 24


@every_causal_case
def test_left_padding_does_not_change_what_is_generated(variant, settings):
    model = causal_model(variant, settings)
    ids = inputs(1, 12)
    alone = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    padded = torch.cat([inputs(1, 32), ids], 1)
    mask = (torch.arange(44) >= 32).long()[None]
    together = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert together[:, 32:].equal(alone)


@pytest.mark.parametrize(
    ("slug", "settings", "most"),
    [
        ("local", {"window_size": 4}, 10),
        ("stride", {"stride": 3, "hops": 2}, 14),
        ("global", {"num_global_tokens": 3}, 5),
        ("mixed", {"head_patterns": ["local:4", "global:2"]}, 12),
    ],
)
def test_memory_of_the_cache_does_not_grow(slug, settings, most):
    model = causal_model(VARIANTS[slug], settings)
    output = model.generate(
        inputs(1, 50), max_new_tokens=60, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    assert all(layer.keys.shape[2] <= most for layer in output.past_key_values.layers)
    assert output.past_key_values.get_seq_length() == 109


@every_variant
def test_an_empty_cache_of_the_caller_is_used(variant):
    if variant.causal:
        model = causal_model(variant, SETTINGS[variant.slug][0])
        cache = DynamicCache(config=model.config)
        output = model(inputs(1, 9), past_key_values=cache)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == 9
        own = [type(layer.mixer.new_cache_layer()) for layer in model.model.layers]
        assert [type(layer) for layer in cache.layers] == own
        cache.reset()
        assert cache.get_seq_length() == 0
        assert model(inputs(1, 4), past_key_values=cache).past_key_values.get_seq_length() == 4


def test_a_cache_with_foreign_states_is_refused():
    model = causal_model(VARIANTS["local"], {})
    cache = DynamicCache()
    cache.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 0)
    with pytest.raises(ValueError, match="already holds states this model did not write"):
        model(inputs(1, 4), past_key_values=cache)


@torch.no_grad()
def test_logits_to_keep_and_shifted_labels():
    model = causal_model(VARIANTS["local"], {}, dtype=torch.float32)
    ids = inputs(2, 11)
    logits = model(ids).logits
    assert model(ids, logits_to_keep=2).logits.equal(logits[:, -2:])
    assert model(ids, logits_to_keep=torch.tensor([0, 4])).logits.equal(logits[:, [0, 4]])
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=None, shift_labels=shifted).logits, logits)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, expected)


def test_every_causal_setting_is_tested():
    assert {case[0].slug for case, _ in CAUSAL} == {slug for slug, variant in VARIANTS.items() if variant.causal}


def test_a_growing_cache_is_not_copied_for_every_token():
    model = causal_model(VARIANTS["full"], {})
    ids = inputs(2, 60)
    expected = model(ids, use_cache=False).logits.detach()
    cache, places = None, []
    for start in range(60):
        with torch.inference_mode() if 20 <= start < 25 else torch.no_grad():  # the first one's cannot be written later
            output = model(ids[:, start : start + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        places.append(cache.layers[0].keys.data_ptr())
        torch.testing.assert_close(output.logits[:, 0], expected[:, start], rtol=1e-9, atol=1e-9)
    assert len(set(places)) <= 6


def test_a_gradient_goes_through_a_cache():
    model = causal_model(VARIANTS["full"], {})
    embeds = model.get_input_embeddings()(inputs(1, 9)).detach().requires_grad_()
    whole = model(inputs_embeds=embeds, use_cache=False).logits[:, 6:].square().sum()
    cache = model(inputs_embeds=embeds[:, :6], use_cache=True).past_key_values
    rest = model(inputs_embeds=embeds[:, 6:], past_key_values=cache).logits.square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, embeds)[0] for loss in (whole, rest)))
