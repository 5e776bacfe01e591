"""What only Longformer and BigBird have: the head's choice of global tokens, folded projections, stored blocks."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from zoo import SETTINGS, ConfigRefused, build, config, inputs

from efficient_transformers import VARIANTS, costs

LONGFORMER, BIG_BIRD = VARIANTS["longformer"], VARIANTS["big_bird"]
SEPARATOR = 5


def read_by_all(model, ids, **arguments):
    """Positions whose embedding every output of a one-layer body depends on: the global tokens."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, **arguments).last_hidden_state[0]
    probe = torch.randn(output.shape[-1], dtype=output.dtype)
    grads = [torch.autograd.grad(row @ probe, embeds, retain_graph=True)[0][0].abs().sum(-1) > 0 for row in output]
    return torch.stack(grads).all(0).nonzero().flatten().tolist()


def test_heads_that_judge_a_sequence_make_its_first_token_global():
    given = config(LONGFORMER, {"attention_window": 4, "num_hidden_layers": 1})
    for head, count in (("SequenceClassification", 1), ("MultipleChoice", 1), ("MaskedLM", None)):
        model = LONGFORMER.model_class(head)(given).double().eval()
        assert model.config.num_global_tokens == count
        assert read_by_all(model.model, inputs(1, 20)) == ([0] if count else [])
    assert given.num_global_tokens is None  # the head has settled it in a copy
    settled = LONGFORMER.model_class("SequenceClassification")(config(LONGFORMER, {"num_global_tokens": 3}))
    assert settled.config.num_global_tokens == 3


def test_the_question_is_global_in_question_answering():
    model = build(LONGFORMER, {"attention_window": 4, "sep_token_id": SEPARATOR}, "QuestionAnswering")
    ids = inputs(2, 20)
    ids[ids == SEPARATOR] = 6
    ids[0, [4, 9, 19]] = SEPARATOR  # the second row has no separator, and so no question
    expected = torch.zeros(2, 20, dtype=torch.bool)
    expected[0, :4] = True
    assert model.global_tokens(ids, None).equal(expected)
    marked = torch.zeros_like(ids)
    assert model.global_tokens(ids, marked) is marked
    torch.testing.assert_close(model(ids).start_logits, model(ids, global_attention_mask=expected).start_logits)
    with pytest.raises(ValueError, match=r"cannot be found in inputs_embeds: pass global_attention_mask"):
        model(inputs_embeds=torch.randn(1, 20, 32, dtype=torch.float64))


def test_marks_reach_the_global_heads_alone():
    """With a head for each kind: the others keep their patterns."""
    model = build(LONGFORMER, {"attention_window": 4, "head_layout": "per_head", "num_global_tokens": 0})
    ids, marked = inputs(1, 30), torch.zeros(1, 30, dtype=torch.long)
    marked[0, 11] = 1
    weights = model(ids, global_attention_mask=marked, output_attentions=True).attentions[0][0]
    assert (weights[:, :, 11] > 0).all(-1).tolist() == [False, False, True, False]  # local, strided, global, local
    without = model(ids, output_attentions=True).attentions[0][0]
    assert weights[[0, 1, 3]].equal(without[[0, 1, 3]])


def test_one_global_token_costs_no_projection_of_the_sequence():
    fields = {"hidden_size": 256, "max_position_embeddings": 4096, "num_hidden_layers": 1}
    without, one, many = (
        costs.attention_flops(config(LONGFORMER, {**fields, "num_global_tokens": count}), 4096) for count in (0, 1, 90)
    )
    two_projections = 2 * 2 * 4096 * 256 * 256
    assert one - without < 0.1 * two_projections
    assert many - without > two_projections


def test_an_adapter_on_a_global_projection_is_not_bypassed():
    """Folding reads a layer's weight; where LoRA stands in for the layer, its own path has to be taken."""
    model = build(LONGFORMER, {"attention_window": 4, "num_global_tokens": 1})
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["global_v_proj"], init_lora_weights=False)).double()
    ids = inputs(1, 20)
    with torch.no_grad():
        changed = adapted(ids).last_hidden_state
        with adapted.disable_adapter():
            plain = adapted(ids).last_hidden_state
        model.set_attn_implementation("eager")
        torch.testing.assert_close(changed, adapted(ids).last_hidden_state)
    assert (changed - plain).abs().max() > 1e-3


def test_a_causal_longformer_marks_nothing_and_projects_once():
    model = build(LONGFORMER, {"attention_window": 4, "num_global_tokens": 1}, "CausalLM")
    assert not any("global_" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="as a decoder: its global tokens are the first ones"):
        model.model(inputs(1, 8), global_attention_mask=torch.ones(1, 8))


def test_stored_blocks_travel_with_the_weights(tmp_path):
    model = build(BIG_BIRD, {"block_size": 4, "random_blocks": "stored"}, dtype=torch.float32)
    table = model.layers[0].mixer.random_blocks
    assert table.shape == (4, 32, 3)
    assert not table.equal(model.layers[1].mixer.random_blocks)
    ids = inputs(2, 100)
    before = model(ids).last_hidden_state
    table[:, 5] = torch.tensor([9, 9, -1])  # twice, and once none
    after = model(ids).last_hidden_state
    assert not after.equal(before)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.layers[0].mixer.random_blocks.equal(table)
    torch.testing.assert_close(loaded(ids).last_hidden_state, after)
    for implementation in ("eager", "flex_attention"):  # a block read twice is beyond a mask: not the flex kernel's
        loaded.set_attn_implementation(implementation)
        torch.testing.assert_close(loaded(ids).last_hidden_state, after, rtol=1e-4, atol=1e-5)


def test_drawn_blocks_follow_from_the_seed(tmp_path):
    fields = {"block_size": 4, "num_random_blocks": 2}
    model = build(BIG_BIRD, fields, dtype=torch.float32)
    assert not any("random" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    ids = inputs(1, 100)
    expected = model(ids).last_hidden_state
    assert transformers.AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state.equal(expected)
    other = transformers.AutoModel.from_pretrained(tmp_path, pattern_seed=1).eval()
    assert (other(ids).last_hidden_state - expected).abs().max() > 1e-3


def test_every_block_of_a_long_sequence_draws_as_many_as_it_should():
    """Never its neighbours or the ends, whatever the length; heads and layers draw for themselves."""
    cfg = config(BIG_BIRD, {"block_size": 4, "num_random_blocks": 3})
    tables = [cfg.attention_patterns(layer)[0].random_blocks(4, 20) for layer in (0, 1)]
    assert not tables[0].equal(tables[1])
    for head in range(4):
        assert not any(tables[0][head].equal(tables[0][other]) for other in range(head))
        for i, row in enumerate(tables[0][head].tolist()):
            assert len(set(row)) == 3
            assert all(0 < j < 19 and abs(i - j) > 1 for j in row)
    assert (cfg.attention_patterns(0)[0].random_blocks(4, 5) >= 0).sum() < 4 * 5 * 3  # too few to draw from


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (LONGFORMER, {"attention_window": 7}, r"attention_window \(7\) must be a multiple of 2"),
        (LONGFORMER, {"attention_window": [4, 6, 8]}, "attention_window has 3 entries and num_hidden_layers is 2"),
        (LONGFORMER, {"attention_window": 0}, r"attention_window \(0\) must be at least 2"),
        (LONGFORMER, {"attention_dilation": [1, 2, 3]}, "attention_dilation has 3 entries"),
        (LONGFORMER, {"attention_dilation": [[1, 2], [1, 2]]}, "attention_dilation of layer 0 has 2 entries"),
        (LONGFORMER, {"attention_dilation": 2, "head_layout": "per_head"}, "set stride and hops"),
        (LONGFORMER, {"head_layout": "per_head", "num_attention_heads": 2}, "per_head has three kinds of heads"),
        (BIG_BIRD, {"num_window_blocks": 2}, r"num_window_blocks \(2\) must be odd"),
        (BIG_BIRD, {"is_decoder": True}, "BigBird cannot be causal.*use et_mixed"),
        (BIG_BIRD, {"head_layout": "per_head", "num_attention_heads": 2}, "per_head has four kinds of heads"),
        (BIG_BIRD, {"global_token_type": "external", "num_global_tokens": 0}, "must be at least 1"),
        (BIG_BIRD, {"block_size": 0}, r"block_size \(0\) must be at least 1"),
    ],
)
def test_bad_configs_are_refused(variant, fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(variant, fields)


@pytest.mark.parametrize("slug", ["longformer", "big_bird"])
def test_unions_and_heads_side_by_side_are_different_models(slug):
    ids = inputs(1, 60)
    torch.manual_seed(0)
    union = build(VARIANTS[slug], SETTINGS[slug][0] | {"num_global_tokens": 1})
    side_by_side = build(VARIANTS[slug], SETTINGS[slug][0] | {"num_global_tokens": 1, "head_layout": "per_head"})
    side_by_side.load_state_dict(union.state_dict(), strict=False)
    assert (union(ids).last_hidden_state - side_by_side(ids).last_hidden_state).abs().max() > 1e-3
