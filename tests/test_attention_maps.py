"""`output_attentions`: a map of every layer at every step, laid out by the caller's tokens and part of the graph."""

import pytest
import torch
from zoo import CASES, IDS, MODES, build, can_be_causal, inputs

from efficient_transformers.models.kernel_attention import KernelAttention

WITH_MAPS = [mode for mode in MODES if mode.values[0].attention]
SUMS = {"linear", "efficient", "rfa", "performer"}  # their caches keep no keys
CACHED = [
    pytest.param(*case, id=name)
    for case, name in zip(CASES, IDS, strict=True)
    if case[0].attention and can_be_causal(*case) and case[0].slug not in SUMS
]
every_mode = pytest.mark.parametrize(("variant", "settings", "causal"), WITH_MAPS)


def padded(batch: int = 3, length: int = 20):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 5:9] = 0
    return inputs(batch, length), mask


@every_mode
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_maps_are_part_of_the_graph(variant, settings, causal, dropout):
    """With padding on the left, holes, external tokens and dropout."""
    if variant.slug in SUMS:
        dropout = 0.0
    changes = {"attention_probs_dropout_prob": dropout, "is_decoder": causal, "use_cache": False}
    model = build(variant, settings, **changes).train(dropout > 0)
    ids, mask = padded()
    output = model(ids, attention_mask=mask, output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert weights.shape == (3, 4, 20, 20)
        weights.retain_grad()
    (output.last_hidden_state * torch.randn(3, 20, 32, dtype=torch.float64)).sum().backward()
    for weights in output.attentions:
        assert weights.grad.abs().max() > 0
        seen = weights.masked_fill((mask[:, None, :, None] * mask[:, None, None]) == 1, 0)
        assert not seen.any()  # nothing of padding
    if not dropout:
        expected = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(output.last_hidden_state, expected)


@every_mode
@torch.no_grad()
def test_the_layout_of_maps_is_that_of_the_tokens(variant, settings, causal):
    model, (ids, mask) = build(variant, settings, is_decoder=causal, use_cache=False), padded()
    together = model(ids, attention_mask=mask, output_attentions=True).attentions
    for row, keep in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, keep], output_attentions=True).attentions
        for weights, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(weights[row][:, keep][:, :, keep], expected[0])


@pytest.mark.parametrize(("variant", "settings"), CACHED)
@torch.no_grad()
def test_maps_of_steps_are_the_rows_of_the_whole(variant, settings):
    model, (ids, mask) = build(variant, settings, "CausalLM"), padded()
    whole = model(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    cache, start = None, 0
    for size in (3, 8, 1, 1, 4, 1, 1, 1):
        stop = start + size
        output = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True,
            use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        assert len(output.attentions) == 2
        for weights, expected in zip(output.attentions, whole.attentions, strict=True):
            torch.testing.assert_close(weights, expected[:, :, start:stop, :stop])
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(output.logits[real], whole.logits[:, start:stop][real])
        start = stop


@pytest.mark.parametrize(("variant", "settings"), CACHED)
def test_maps_of_steps_are_part_of_the_graph(variant, settings):
    model, (ids, mask) = build(variant, settings, "CausalLM"), padded()
    cache = model(ids[:, :14], attention_mask=mask[:, :14]).past_key_values
    for start, stop in ((14, 18), (18, 19)):
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.logits.square().sum().backward(retain_graph=True)
        assert all(weights.grad.abs().max() > 0 for weights in output.attentions)


@pytest.mark.parametrize(("variant", "settings"), CACHED)
def test_generate_gives_maps_of_every_layer_at_every_step(variant, settings):
    model = build(variant, settings, "CausalLM")
    how = {"max_new_tokens": 4, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    steps = model.generate(inputs(2, 9), **how).attentions
    assert [[weights.shape for weights in step] for step in steps] == [
        [(2, 4, queries, keys)] * 2 for queries, keys in ((9, 9), (1, 10), (1, 11), (1, 12))
    ]


@pytest.mark.parametrize("slug", sorted(SUMS))
@torch.no_grad()
def test_caches_of_sums_refuse_maps_of_later_steps(slug):
    variant, settings = next(case for case in CASES if case[0].slug == slug)
    model, ids = build(variant, settings, "CausalLM"), inputs(1, 9)
    assert isinstance(model.model.layers[0].mixer, KernelAttention)
    first = model(ids[:, :8], output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions needs use_cache=False .* keeps sums over all tokens"):
        model(ids[:, 8:], past_key_values=first.past_key_values, output_attentions=True)
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close([x[:, :, :8, :8] for x in maps], list(first.attentions))
