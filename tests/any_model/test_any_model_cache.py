"""`BoundedCache`: the text of the uncached model, from a memory that does not grow."""

import pytest
import torch
from host_models import model_of
from transformers import AutoModelForCausalLM, DynamicCache

from efficient_transformers import BoundedCache, set_attention

PATTERNS = ["local:6", "local:6 | global:3", ["local:3 | global:1", "local:8"], "stride:3:2 | global:2", "blocks:1:4"]


def decoder(pattern, kind="llama", **settings):
    model = model_of(kind, AutoModelForCausalLM, **settings)
    set_attention(model, pattern)
    return model


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_text_equals_that_without_cache(pattern, beams):
    model = decoder(pattern)
    ids, keep = torch.randint(3, 99, (3, 30)), torch.ones(3, 30, dtype=torch.long)
    keep[0, :17] = keep[1, :2] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "num_beams": beams, "attention_mask": keep}
    expected = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, past_key_values=BoundedCache(model), **options).equal(expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt2", "qwen3"])
def test_models_with_windows_of_their_own_or_without_rotary_positions(kind):
    model = decoder("local:6 | global:2", kind, sliding_window=8)
    ids = torch.randint(3, 99, (2, 30))
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    assert model.generate(ids, past_key_values=BoundedCache(model), **options).equal(expected)


def test_pieces_of_a_prompt_and_memory():
    model, cache = decoder("local:6 | global:3"), None
    ids = torch.randint(3, 99, (2, 300))
    whole, found, most = model(ids, use_cache=False).logits, [], 0
    cache = BoundedCache(model)
    for piece in ids.split([40, 1, 7, *[1] * 200, 52], 1):
        found.append(model(piece, past_key_values=cache).logits)
        most = max(most, *(layer.positions.shape[1] for layer in cache.layers))
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 300
    assert most <= 3 + 2 * 7 + 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [(None, "layer 0 has no rule"), ("full", "attends to the whole past"), ("linear", "attends to the whole past")],
)
def test_what_has_no_bound_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        BoundedCache(decoder(pattern))


def test_a_model_that_does_not_number_its_tokens_is_refused():
    model = decoder("local:6")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'attn_implementation="efficient"'):
        model.generate(torch.randint(3, 99, (1, 9)), past_key_values=BoundedCache(model), max_new_tokens=3)


def test_keys_that_a_model_changes_after_its_cache_are_refused(monkeypatch):
    model = decoder("local:6")
    update = BoundedCache.update
    monkeypatch.setattr(BoundedCache, "update", lambda *args, **kw: [x.clone() for x in update(*args, **kw)])
    with pytest.raises(ValueError, match="BoundedCache"):
        model.generate(torch.randint(3, 99, (1, 30)), past_key_values=BoundedCache(model), max_new_tokens=20)


def test_a_dynamic_cache_gives_the_same_logits():
    model, caches = decoder("local:6 | global:3"), None
    ids = torch.randint(3, 99, (2, 60))
    caches = [BoundedCache(model), DynamicCache()]
    for piece in ids.split(20, 1):
        bounded, dynamic = (model(piece, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(bounded, dynamic, atol=1e-5, rtol=1e-4)
