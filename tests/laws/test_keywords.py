"""Every `forward` accepts the keywords it documents and those that libraries pass, and refuses all others."""

import inspect

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer
from zoo import CAUSAL, SETTINGS, build, inputs, inputs_of

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_signatures import CACHE_FIELD, SHARED

EVERY_MODEL = [(v, head) for v in VARIANTS.values() for head in (None, *v.heads)]
every_model = pytest.mark.parametrize(
    ("variant", "head"), EVERY_MODEL, ids=[f"{v.slug}-{head or 'Model'}" for v, head in EVERY_MODEL]
)
# the first setting of each variant that has a causal head
DECODERS = {variant.slug: (variant, settings) for (variant, settings), _ in reversed(CAUSAL)}
every_decoder = pytest.mark.parametrize(("variant", "settings"), DECODERS.values(), ids=DECODERS)


@every_model
def test_an_unknown_keyword_is_refused_with_the_nearest_one(variant, head):
    model = build(variant, SETTINGS[variant.slug][0], head)
    x = inputs_of(model, 1, 9)
    with pytest.raises(TypeError, match=r"'atention_mask'.*nearest keyword is 'attention_mask'"):
        model(x, atention_mask=torch.ones(1, 9))
    with pytest.raises(TypeError, match="'output_router_logits'"):
        model(x, output_router_logits=True)


@every_model
def test_keywords_that_libraries_pass_change_nothing(variant, head):
    model = build(variant, SETTINGS[variant.slug][0], head)
    x = inputs_of(model, 1, 9)
    expected = model(x)[0]
    passed = dict.fromkeys(SHARED)
    passed |= {"cache_position": torch.arange(9), "num_items_in_batch": torch.tensor(3), "return_dict": False}
    assert model(x, **passed)[0].equal(expected)


@every_model
def test_tuples_by_argument_and_by_config(variant, head):
    """The same values, without those that are None; `return_dict=True` overrides the config."""
    model = build(variant, SETTINGS[variant.slug][0], head)
    x = inputs_of(model, 2, 9)
    expected = model(x, output_hidden_states=True)
    by_argument = model(x, output_hidden_states=True, return_dict=False)
    model.config.return_dict = False
    for output in (by_argument, model(x, output_hidden_states=True)):
        assert isinstance(output, tuple)
        assert len(output) == len(expected)
        assert output[0].equal(expected[0])
    assert model(x, return_dict=True).keys() >= {*expected.keys()} - {"hidden_states"}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_input_of_the_other_kind_is_refused(variant):
    text = build(variant, SETTINGS[variant.slug][0])
    with pytest.raises(ValueError, match="takes input_ids and got pixel_values"):
        text(inputs(1, 5), pixel_values=torch.randn(1, 3, 4, 4))
    images = build(variant, SETTINGS[variant.slug][0], "ImageClassification")
    with pytest.raises(ValueError, match="takes pixel_values and got input_ids"):
        images(inputs_of(images, 1, 0), input_ids=inputs(1, 5))


def test_keywords_of_packed_rows_need_positions():
    model = build(VARIANTS["local"], SETTINGS["local"][0], "CausalLM")
    starts = torch.tensor([0, 4, 9])
    with pytest.raises(ValueError, match="cu_seq_lens_q cannot divide packed rows without position_ids"):
        model(inputs(1, 9), cu_seq_lens_q=starts)
    ids, positions = inputs(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, cu_seq_lens_q=starts, max_length_q=5).logits
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits)


# the cache and its two names -----------------------------------------------------------------------------------------


@every_decoder
def test_the_cache_has_two_names(variant, settings):
    """transformers 5.24 passes and expects `cache`, older versions `past_key_values`."""
    for model in (build(variant, settings, "CausalLM"), build(variant, settings, is_decoder=True)):
        ids = inputs(1, 12)
        embeds = model.get_input_embeddings()(ids)
        expected = model(ids, use_cache=False)[0][:, 8:]
        for name in ("cache", "past_key_values"):
            for first, rest in (({"input_ids": ids[:, :8]}, {"input_ids": ids[:, 8:]}),
                                ({"inputs_embeds": embeds[:, :8]}, {"inputs_embeds": embeds[:, 8:]})):  # fmt: skip
                output = model(**first, use_cache=True)
                cache = getattr(output, CACHE_FIELD)
                assert CACHE_FIELD in output
                assert cache.get_seq_length() == 8
                torch.testing.assert_close(model(**rest, **{name: cache})[0], expected)
        with pytest.raises(TypeError, match="two names of one argument"):
            model(ids, cache=cache, past_key_values=cache)


@every_decoder
def test_greedy_text_is_the_same_with_and_without_a_cache(variant, settings):
    """Padded batches included. The text without a cache is written out: `generate` is not trusted."""
    model = build(variant, settings, "CausalLM")
    ids, mask = inputs(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    how = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **how)
    with torch.no_grad():
        for _ in range(20):
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert cached.equal(ids)


def foreign_caches(model) -> dict[str, object]:
    config = model.config
    return {
        "StaticCache": transformers.StaticCache(config=config, max_cache_len=64),
        "EncoderDecoderCache": transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=config), transformers.DynamicCache(config=config)
        ),
        "offload": transformers.DynamicCache(config=config, offloading=True),
        "tuple": ((torch.zeros(1, 4, 3, 8),) * 2,) * 2,
        "DynamicLayer": transformers.Cache(layers=[DynamicLayer(), DynamicLayer()]),
    }


@every_decoder
def test_a_foreign_cache_is_refused_before_anything_is_computed(variant, settings, monkeypatch):
    for model in (build(variant, settings, "CausalLM"), build(variant, settings, is_decoder=True)):
        embeds = model.get_input_embeddings()(inputs(1, 5))
        caches = foreign_caches(model)
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("computed"))
        for name, cache in caches.items():
            for given in ({"input_ids": inputs(1, 5)}, {"inputs_embeds": embeds}):
                with pytest.raises(ValueError, match=name):
                    model(**given, past_key_values=cache)
                with pytest.raises(ValueError, match=name):
                    model(**given, cache=cache)
        monkeypatch.undo()


@every_decoder
def test_generate_fills_an_empty_dynamic_cache_and_refuses_other_kinds(variant, settings):
    model = build(variant, settings, "CausalLM")
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = inputs(1, 5)
    expected, cache = model.generate(ids, **how), transformers.DynamicCache()
    assert model.generate(ids, **{CACHE_FIELD: cache}, **how).equal(expected)
    assert cache.get_seq_length() >= 10
    assert model.generate(ids, prefill_chunk_size=2, **how).equal(expected)
    for kind, message in {"static": "StaticCache", "offloaded": "offload"}.items():
        with pytest.raises(ValueError, match=message):
            model.generate(ids, cache_implementation=kind, **how)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_an_encoder_refuses_a_cache(variant):
    for head in (None, *variant.heads):
        if head != "CausalLM":
            model = build(variant, SETTINGS[variant.slug][0], head)
            with pytest.raises(ValueError, match="is an encoder and uses no cache"):
                model(inputs_of(model, 1, 5), past_key_values=transformers.DynamicCache())


# what transformers looks up by name ----------------------------------------------------------------------------------


def test_the_cache_is_no_prediction():
    """Trainer gathers every output but those named here."""
    for variant in VARIANTS.values():
        assert {"cache", "past_key_values"} <= {*variant.config_class.keys_to_ignore_at_inference}


@every_model
def test_signatures_tell_trainer_what_it_has_to_know(variant, head):
    """Which columns of a data set a model takes; which of them are labels."""
    names = inspect.signature(variant.model_class(head).forward).parameters
    labels = {name for name in names if "label" in name or name in ("start_positions", "end_positions")}
    expected = {None: set(), "QuestionAnswering": {"start_positions", "end_positions"}}.get(head, {"labels"})
    assert labels == expected
