"""Assisted and prompt-lookup decoding: the same tokens as greedy decoding, or an error before the first token."""

import pytest
import torch
from zoo import CAUSAL, SETTINGS, build, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_kernel_attention import KernelConfig


def keeps_tokens(variant) -> bool:
    """The others keep sums or segments, from which no token can be removed."""
    return not issubclass(variant.config_class, KernelConfig) and variant.slug not in ("sinkhorn", "compressed")


ROLLED_BACK = [pytest.param(*case, id=name) for case, name in CAUSAL if keeps_tokens(case[0])]
REFUSED = [pytest.param(*case, id=name) for case, name in CAUSAL if not keeps_tokens(case[0])]
GREEDY = {"max_new_tokens": 25, "do_sample": False}
REPEATS = torch.tensor([[5, 6, 7, 8, 9] * 5])  # so that the prompt holds candidates


def assistant_like(model):
    """A model of the same kind that agrees with `model` most of the time."""
    assistant = type(model)(model.config).to(model.dtype).eval()
    assistant.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in assistant.lm_head.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    return assistant


@pytest.mark.parametrize(("variant", "settings"), ROLLED_BACK)
def test_candidates_change_nothing(variant, settings):
    model = build(variant, settings, "CausalLM", tie_word_embeddings=False)
    expected = model.generate(REPEATS, **GREEDY)
    for how in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": assistant_like(model)}):
        output = model.generate(REPEATS, **GREEDY, **how)
        # transformers 5.13 keeps all accepted candidates, a few more than max_new_tokens allows
        assert output[:, : expected.shape[1]].equal(expected)


@pytest.mark.parametrize(("variant", "settings"), REFUSED)
def test_caches_of_sums_refuse_before_the_first_token(variant, settings, monkeypatch):
    model = build(variant, settings, "CausalLM")
    full = build(VARIANTS["full"], {}, "CausalLM")
    monkeypatch.setattr(model.model, "run", None)  # no forward pass gets this far
    monkeypatch.setattr(full.model, "run", None)
    reason = f"{type(model).__name__} cannot generate with an assistant .* keeps (sums over|one key and one value)"
    for helped, how in (
        (model, {"prompt_lookup_num_tokens": 5}),
        (model, {"assistant_model": full}),
        (full, {"assistant_model": model}),
    ):
        with pytest.raises(ValueError, match=reason):
            helped.generate(inputs(1, 4), **GREEDY, **how)


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.causal], ids=lambda v: v.slug)
def test_continuous_batching_is_refused(variant):
    model = build(variant, SETTINGS[variant.slug][0], "CausalLM")
    with pytest.raises(
        NotImplementedError, match=r"generate_batch.* cache of its own. Use generate with a padded batch"
    ):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.parametrize(("variant", "settings"), ROLLED_BACK)
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_come(variant, settings):
    model, ids = build(variant, settings, "CausalLM"), inputs(3, 40)
    mask = torch.ones(3, 44, dtype=torch.long)
    mask[0, :30] = 0
    mask[1, 20:23] = 0
    expected = model(ids, attention_mask=mask[:, :40]).logits
    cache = model(ids[:, :25], attention_mask=mask[:, :25]).past_key_values
    for layer in cache.layers:
        layer.activate_past_recording()
    assert all(layer.is_croppable for layer in cache.layers)
    for start, stop in ((25, 33), (33, 40)):
        rejected = torch.cat([ids[:, start:stop], inputs(3, 4)], 1)
        model(rejected, attention_mask=mask[:, : stop + 4], past_key_values=cache)
        cache.crop(-6)
        assert cache.get_seq_length() == stop - 2
        logits = model(ids[:, stop - 2 : stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
        real = mask[:, stop - 2 : stop].bool()
        torch.testing.assert_close(logits[real], expected[:, stop - 2 : stop][real])
    cache.crop(0)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_a_window_gives_back_what_came_after_its_last_eviction():
    model, ids = build(VARIANTS["local"], {"window_size": 3}, "CausalLM"), inputs(1, 30)
    cache = model(ids[:, :20]).past_key_values
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match=r"1 tokens must be no more than the 0 .* activate_past_recording"):
        cache.crop(-1)
    model(ids[:, 20:22], past_key_values=cache)
    cache.crop(-2)
    rest = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 20:])
    for slug, kept in (("linear", "sums over all tokens"), ("compressed", "one key and one value")):
        sums = build(VARIANTS[slug], SETTINGS[slug][0], "CausalLM")(ids).past_key_values
        with pytest.raises(ValueError, match=f"keeps {kept}"):
            sums.layers[0].crop(-1)
