"""On a CUDA device the same numbers as on a CPU, where the other tests check them. Skipped where there is no device."""

import pytest
import torch
from torch import Tensor
from zoo import (
    CASES,
    CAUSAL,
    IDS,
    MODES,
    SETTINGS,
    build,
    gradients_in_both_precisions,
    inputs,
    probed,
    used_parameters,
)

from efficient_transformers import VARIANTS
from efficient_transformers.models import attn_linear as engine
from efficient_transformers.models.attn_linear import causal_linear_attention
from efficient_transformers.models.attn_pattern_flex import flex_pattern_attention
from efficient_transformers.models.attn_pattern_tiled import tiled_attention
from efficient_transformers.models.ops_engine import BatchRows
from efficient_transformers.models.ops_feature_maps import FEATURE_MAPS
from efficient_transformers.models.ops_patterns import parse_pattern

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


def padded(length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of three rows: a full one, one padded on the left, one padded on the right."""
    ids, mask = inputs(3, length), torch.ones(3, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    mask[2, length // 2 :] = 0
    return ids, mask


def hidden_and_gradients(model, ids: Tensor, mask: Tensor, **arguments) -> list[Tensor]:
    """The last hidden state and the gradients of what the model has of weights, on the CPU."""
    hidden = model(ids.to(model.device), attention_mask=mask.to(model.device), **arguments).last_hidden_state
    return [x.detach().cpu() for x in (hidden, *torch.autograd.grad(probed(hidden), used_parameters(model)))]


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_values_and_gradients_are_those_of_the_cpu(variant, settings, decoder, implementation):
    model = build(variant, settings, is_decoder=decoder)
    model.set_attn_implementation(implementation)
    batch = padded(67)
    expected = hidden_and_gradients(model, *batch)
    for actual, wanted in zip(hidden_and_gradients(model.to(DEVICE), *batch), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_models_can_be_made_on_the_device(variant, settings):
    with torch.device(DEVICE):
        made = build(variant, settings)
    batch = padded(50)
    assert all(x.isfinite().all() for x in hidden_and_gradients(made, *batch))
    other = build(variant, settings)  # and what that left behind does no harm to those on the CPU
    other.load_state_dict(made.state_dict())
    for actual, wanted in zip(hidden_and_gradients(made, *batch), hidden_and_gradients(other, *batch), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS["longformer"])
def test_marked_tokens_are_global(settings):
    model = build(VARIANTS["longformer"], settings)
    ids, mask = padded(67)
    marks = torch.zeros_like(mask)
    marks[0, 33], marks[1, 50], marks[2, 5:9] = 1, 1, 1
    expected = model(ids, attention_mask=mask, global_attention_mask=marks).last_hidden_state
    ids, mask, marks = (x.to(DEVICE) for x in (ids, mask, marks))
    actual = model.to(DEVICE)(ids, attention_mask=mask, global_attention_mask=marks).last_hidden_state
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_autocast_trains(variant, settings, same_choices):
    """Mixed precision as accelerate does it: near the gradients of float32, and a batch is learned."""
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, initializer_range=0.1)
    model = model.to(DEVICE).train()
    ids, labels = inputs(2, 60).to(DEVICE), torch.tensor([0, 1], device=DEVICE)
    grads = gradients_in_both_precisions(model, ids, labels)
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98
    before, optimiser = model(ids, labels=labels).loss.item(), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < before / 4


@pytest.mark.parametrize(("variant", "settings"), [case for case, _ in CAUSAL], ids=[name for _, name in CAUSAL])
def test_it_writes_what_it_writes_on_a_cpu(variant, settings):
    model = build(variant, settings, "CausalLM", is_decoder=True)
    ids, mask = padded(40)
    ids, mask = ids[:2], mask[:2]
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **length)
    actual = model.to(DEVICE).generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **length)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("slug", [v.slug for v in VARIANTS.values() if v.model_class()._supports_flex_attn])
def test_flex_attention_has_the_values_and_gradients_of_the_others(slug):
    torch.compiler.reset()
    model = build(VARIANTS[slug], SETTINGS[slug][0], dtype=torch.float32, hidden_size=64).to(DEVICE)
    batch, found = padded(67), []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        found.append(hidden_and_gradients(model, *batch))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_flex_attention_takes_any_number_of_lengths(causal):
    """torch gives up on a function that it has compiled eight times, and a writer's batches have more lengths."""
    torch.compiler.reset()
    pattern = parse_pattern("local:7 | global:2", causal=causal)
    for length in (*range(1, 20), 70, 127, 128, 129, 300, 1000):
        q, k, v = (torch.randn(2, 2, length, 16, device=DEVICE, requires_grad=True) for _ in range(3))
        lengths = (length, -(-length // 2))
        keep = torch.arange(length, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
        out = flex_pattern_attention(q, k, v, pattern, BatchRows(padding_mask=keep))
        expected = tiled_attention(*(x.cpu() for x in (q, k, v)), pattern, BatchRows(lengths=lengths))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
        out.square().sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("slug", VARIANTS)
def test_compiled_models_agree(slug):
    torch.compiler.reset()
    model = build(VARIANTS[slug], SETTINGS[slug][0], dtype=torch.float32).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in padded(50))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        actual = torch.compile(model)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(engine.fla() is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("gated", [False, True])
def test_flash_linear_attention_computes_the_same(gated, monkeypatch):
    q, k, v = (torch.randn(2, 3, 300, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    decay = torch.randn(2, 3, 300, device=DEVICE).sigmoid().log() / 10 if gated else None
    keep = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    keep[1, 200:] = False
    found = []
    for taken in (False, True):
        monkeypatch.setattr(engine, "fla_takes", lambda q, taken=taken: taken)
        out, state = causal_linear_attention(q, k, v, FEATURE_MAPS["elu"], None, keep, decay)
        later, _ = causal_linear_attention(q, k, v, FEATURE_MAPS["elu"], None, keep, decay, state)
        out, later = (x * keep[:, None, :, None] for x in (out, later))
        found.append((out, later, *torch.autograd.grad((out + later).square().sum(), (q, k, v))))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
