"""Every engine computes its written-out formula: values and gradients, training after inference, half precision."""

from copy import deepcopy

import pytest
import torch
from zoo import (
    MODES,
    SETTINGS,
    SMALL,
    build,
    every_case,
    every_variant,
    gradients_in_both_precisions,
    inputs,
    probed,
    used_parameters,
)

from efficient_transformers import VARIANTS
from efficient_transformers.models import attn_pattern
from efficient_transformers.models import attn_pattern_tiled as engine

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
@pytest.mark.parametrize("length", [1, 2, 67, 125])
def test_the_efficient_path_equals_the_written_out_one(variant, settings, length, decoder):
    model = build(variant, settings, is_decoder=decoder)
    ids = inputs(2, length)
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        outputs.append((hidden, torch.autograd.grad(probed(hidden[-1]), used_parameters(model))))
    (sparse, sparse_grads), (dense, dense_grads) = outputs
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_short_mixed_heads_take_one_dense_product(monkeypatch):
    """All kinds of heads in one call, the same numbers."""
    model = build(VARIANTS["mixed"], SETTINGS["mixed"][0])
    ids = inputs(2, 40)
    expected = model(ids).last_hidden_state
    for module in (engine, attn_pattern):
        monkeypatch.setattr(module, "is_short", lambda *sizes: True)
    monkeypatch.setattr(attn_pattern, "tiled_attention", None)
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
def test_training_follows_inference(variant, settings, short, monkeypatch):
    """Masks are kept between calls; those made in inference mode must not spoil a backward."""
    if short:
        for module in (engine, attn_pattern):
            monkeypatch.setattr(module, "is_short", lambda *sizes: True)
    model = build(variant, settings)
    length = 71 if short else 73  # lengths that no other test has made masks for
    ids = inputs(2, length)
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
    output = model(ids).last_hidden_state
    probed(output).backward()
    assert output.equal(expected)


@every_case
def test_every_length_up_to_the_stated_one(variant, settings):
    model = build(variant, settings, max_position_embeddings=40)
    for length in (*range(1, 41), 3):
        assert model(inputs(1, length)).last_hidden_state.shape == (1, length, 32)
    with pytest.raises(ValueError, match="built for 40 positions and got 41: set max_position_embeddings"):
        model(inputs(1, 41))


@pytest.mark.sampled(4)
@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_at_8192_tokens(variant, dtype, same_choices):
    shape = {"max_position_embeddings": 8192, "num_hidden_layers": 1, "initializer_range": 0.1}
    settings = variant.config_class(**{**SMALL, **shape}).to_dict()
    model = build(
        variant, {k: v for k, v in settings.items() if k in ("window_size", "stride", "head_patterns")}, **shape
    )
    ids = inputs(1, 8192)
    with torch.no_grad():
        rounded = deepcopy(model).to(dtype)(ids).last_hidden_state
        exact = model(ids).last_hidden_state
        exact_of_rounded = deepcopy(model).to(dtype).double()(ids).last_hidden_state
    assert rounded.isfinite().all()
    error = (rounded.double() - exact_of_rounded).abs().max().item()
    budget = 16 * torch.finfo(dtype).eps * exact.abs().max().item()  # a layer rounds at some sixteen places
    assert error <= budget, f"error {error:.2e} over budget {budget:.2e}"


@every_case
def test_autocast_trains(variant, settings, same_choices):
    """Mixed precision as accelerate does it: products in bfloat16, weights and their gradients in float32."""
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, initializer_range=0.1).train()
    ids, labels = inputs(2, 60), torch.tensor([0, 1])
    grads = gradients_in_both_precisions(model, ids, labels)
    assert grads[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


@pytest.mark.slow  # compiles a kernel for every pattern
@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if v.model_class()._supports_flex_attn], ids=lambda v: v.slug
)
def test_flex_attention_is_chosen_by_name(variant):
    model = build(variant, SETTINGS[variant.slug][0], dtype=torch.float32, hidden_size=64)
    ids, mask = inputs(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :13] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("flex_attention")
        assert model.config._attn_implementation == "flex_attention"
        actual = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
