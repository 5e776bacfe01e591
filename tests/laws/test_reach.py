"""An output depends on exactly the tokens that causality and the pattern allow, and attention weights show the same."""

from dataclasses import replace

import pytest
import torch
from zoo import MODES, SETTINGS, ConfigRefused, build, config, inputs, one_layer, patterns_of, probed, readable

from efficient_transformers import VARIANTS
from efficient_transformers.models.attn_pattern import group_heads
from efficient_transformers.models.modeling_compressed import EtCompressedConfig

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.parametrize(("variant", "settings", "decoder"), MODES)
def test_an_output_depends_on_just_what_the_pattern_shows(variant, settings, decoder):
    model = build(variant, settings, **one_layer(settings), use_cache=False, is_decoder=decoder)
    length, external = 24, getattr(model.config, "num_external_tokens", 0)
    embeds = torch.randn(1, length, model.config.embedding_width, dtype=torch.float64)
    if variant.chooses:  # whom a token reads depends on what stands there
        weights = model(inputs_embeds=embeds, output_attentions=True).attentions[0][0]
        expected = (weights > 0).any(0) | torch.eye(length, dtype=torch.bool)  # a residual goes around the attention
    else:
        expected = drawn_mask(model, length + external).any(0)[external:, external:]
    assert readable(model, embeds).equal(expected)
    if decoder:
        assert not expected.triu(1).any()


def drawn_mask(model, length):
    """(h, n, n) of the first layer, with the heads in the order of their groups."""
    table, masks = getattr(model.layers[0].mixer, "random_blocks", None), []
    for pattern, heads in group_heads(patterns_of(model.config, 0), 4):
        if isinstance(model.config, EtCompressedConfig) and model.config.kind(0) == "compressed" and pattern.causal:
            whole = (torch.arange(length) + 1) // model.config.compression_factor * model.config.compression_factor
            masks.append((torch.arange(length) < whole[:, None]) | torch.eye(length, dtype=torch.bool))
            masks[-1] = masks[-1].expand(len(heads), -1, -1)
            continue
        if table is None:
            masks.append(pattern.dense(length, len(heads)))
            continue
        mask = replace(pattern, num_random_blocks=0).dense(length, len(heads))
        for head, block, key in ((h, i, j) for h in heads for i in range(table.shape[1]) for j in table[h, i].tolist()):
            rows, columns = (slice(b * pattern.block_size, (b + 1) * pattern.block_size) for b in (block, key))
            mask = mask.clone()
            mask[heads.index(head), rows, columns] |= key >= 0
        masks.append(mask)
    return torch.cat(masks)


def test_marked_tokens_read_and_are_read_by_everything():
    model = build(VARIANTS["global"], {"num_global_tokens": 0, "num_hidden_layers": 1})
    marked = torch.zeros(1, 12, dtype=torch.long)
    marked[0, [3, 7]] = 1
    embeds = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=embeds, global_attention_mask=marked).last_hidden_state[0]
    probe = torch.randn(32, dtype=torch.float64)
    grads = [torch.autograd.grad(row @ probe, embeds, retain_graph=True)[0][0].abs().sum(-1) > 0 for row in output]
    expected = torch.eye(12, dtype=torch.bool)
    expected[[3, 7]] = expected[:, [3, 7]] = True
    assert torch.stack(grads).equal(expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.attention], ids=lambda v: v.slug)
def test_attentions_are_the_weights_of_the_pattern(variant):
    model = build(variant, SETTINGS[variant.slug][0])
    ids, mask = inputs(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    outputs = model(ids, attention_mask=mask, output_attentions=True)
    assert len(outputs.attentions) == 2
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 20, 20)
        assert weights[0, :, :6].abs().max() == weights[0, :, :, :6].abs().max() == 0
        if variant.normalised:
            torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(-1, 4, -1).double())
    torch.testing.assert_close(outputs.last_hidden_state, model(ids, attention_mask=mask).last_hidden_state)
    outputs = model(ids, output_attentions=True)
    outputs.attentions[0].retain_grad()
    probed(outputs.last_hidden_state).backward()
    assert outputs.attentions[0].grad.abs().max() > 0


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.attention], ids=lambda v: v.slug)
def test_without_attention_there_are_no_attentions(variant):
    model, ids = build(variant, SETTINGS[variant.slug][0]), inputs(2, 20)
    outputs = model(ids, output_attentions=True)
    assert outputs.attentions is None
    assert outputs.last_hidden_state.equal(model(ids).last_hidden_state)
    for field, value in (("position_embedding_type", "rotary"), ("attention_probs_dropout_prob", 0.1)):
        with pytest.raises(ConfigRefused, match=f"{field} .{value!r}?.*no queries to turn and no attention weights"):
            config(variant, {field: value})
