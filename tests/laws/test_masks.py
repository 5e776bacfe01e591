"""Masks and ids per token: every documented convention gives the same, anything else is refused with the way out."""

import pytest
import torch
from zoo import CAUSAL, MODES, SETTINGS, build, every_variant, inputs, inputs_of

from efficient_transformers import VARIANTS
from efficient_transformers.models import ops_checks

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
ADDITIVE = (1.0 - MASK.float()) * -1e4
FOREIGN = {
    "global tokens as 2": (MASK + (torch.arange(7) == 2) * MASK, "got 2:"),
    "additive": (ADDITIVE, r"got -10000: .* mask == 0"),
    "additive, minus infinity": (torch.zeros(3, 7).masked_fill(MASK == 0, -torch.inf), "got -inf: "),
    "additive, lowest float": (ADDITIVE.sign() * torch.finfo(torch.float32).max, "got -3.40282e"),
    "additive without padding": (torch.zeros(3, 7), "all zeros in torch.float32"),
    "NaN": (MASK.float().masked_fill(MASK == 0, torch.nan), "got nan"),
    "a share": (MASK * 0.5, "got 0.5"),
    "negative": (-MASK, "got -1"),
    "each query's": (MASK[:, None, None].expand(3, 1, 7, 7), "must have two axes, batch and length"),
    "each row's": (MASK[0], "must have two axes"),
}
GLOBAL = [variant for variant in VARIANTS.values() if variant.model_class().has_marked_tokens]


def variant_and_head(head: str):
    return [pytest.param(v, head, id=f"{v.slug}-{head}") for v in VARIANTS.values() if head in v.heads]


BODIES = [pytest.param(variant, None, id=variant.slug) for variant in VARIANTS.values()]
HEADS = [pytest.param(VARIANTS["longformer"], head, id=head) for head in VARIANTS["longformer"].heads[:-2]]
HEADS += variant_and_head("CausalLM")


@every_variant
@torch.no_grad()
def test_bool_integer_and_float_masks_are_the_same(variant):
    model, ids = build(variant, SETTINGS[variant.slug][0]), inputs(3, 7)
    expected = model(ids, attention_mask=MASK).last_hidden_state
    assert not expected[MASK == 0].any()
    for dtype in DTYPES:
        assert model(ids, attention_mask=MASK.to(dtype)).last_hidden_state.equal(expected)


@pytest.mark.parametrize(("variant", "head"), [*BODIES, *HEADS])
@torch.no_grad()
def test_other_masks_are_refused_with_the_way_out(variant, head):
    model = build(variant, SETTINGS[variant.slug][0], head)
    ids = inputs_of(model, 3, 7)
    for mask, message in FOREIGN.values():
        if head == "MultipleChoice":
            mask = mask[:, None].expand(-1, 2, *mask.shape[1:]) if mask.dim() > 1 else mask.expand(2, 3, 2, 7)
        with pytest.raises(ValueError, match=f"attention_mask .*{message}"):
            model(ids, attention_mask=mask)


@pytest.mark.parametrize("variant", GLOBAL, ids=lambda variant: variant.slug)
@torch.no_grad()
def test_marks_of_global_tokens_follow_the_same_rules(variant):
    model, ids = build(variant, {**SETTINGS[variant.slug][0], "num_global_tokens": 1}), inputs(3, 7)
    marks = torch.zeros(3, 7, dtype=torch.long)
    marks[:, 4] = 1
    expected = model(ids, attention_mask=MASK, global_attention_mask=marks).last_hidden_state
    assert not expected.equal(model(ids, attention_mask=MASK).last_hidden_state)
    for dtype in DTYPES:
        assert model(ids, MASK, global_attention_mask=marks.to(dtype)).last_hidden_state.equal(expected)
    for wrong in (2 * marks, marks * -1e4, marks * torch.nan, marks[0]):
        with pytest.raises(ValueError, match="global_attention_mask"):
            model(ids, attention_mask=MASK, global_attention_mask=wrong)
    two = MASK + marks * MASK
    with pytest.raises(ValueError, match="global_attention_mask \\(mask == 2"):
        model(ids, attention_mask=two)
    assert model(ids, attention_mask=two > 0, global_attention_mask=two == 2).last_hidden_state.equal(expected)


@every_variant
@torch.no_grad()
def test_ids_per_token_are_integers_of_one_shape(variant):
    model, ids = build(variant, SETTINGS[variant.slug][0], type_vocab_size=2), inputs(3, 7)
    types, places = torch.arange(7) // 4, torch.arange(7) + 1
    expected = model(ids, token_type_ids=types.expand(3, -1), position_ids=places.expand(3, -1)).last_hidden_state
    for mask in (None, MASK[2:].expand(3, -1)):
        shared = model(ids, mask, token_type_ids=types[None].int(), position_ids=places[None].int())
        torch.testing.assert_close(shared.last_hidden_state, expected)
    for name in ("token_type_ids", "position_ids"):
        for wrong in (types[None].double(), types[None] == 1, types[None] * torch.nan):
            with pytest.raises(ValueError, match=f"{name} must be integers, got torch.*long"):
                model(ids, **{name: wrong})
        for wrong in (types, types[:1, None].expand(3, 1), types[None, :3], types.expand(2, -1), types.expand(1, 3, 7)):
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                model(ids, **{name: wrong})


@pytest.mark.parametrize("head", ["MaskedLM", "CausalLM", "TokenClassification"])
@torch.no_grad()
def test_labels_per_token_are_laid_out_as_the_tokens(head):
    """Losses flatten logits and labels, so that transposed labels would be those of other tokens."""
    model, ids = build(VARIANTS["full"], {}, head), inputs(3, 7)
    labels = ids % 2
    assert model(ids, labels=labels).loss.isfinite()
    names = ["labels", "shift_labels"] if head == "CausalLM" else ["labels"]
    for name in names:
        for wrong in (labels.T, labels.flatten(), labels[:, :5], labels[:1]):
            with pytest.raises(ValueError, match=rf"{name} must have shape \(batch, length\) = \(3, 7\)"):
                model(ids, **{name: wrong})


def test_half_of_an_answer_is_refused():
    model, ids = build(VARIANTS["full"], {}, "QuestionAnswering"), inputs(3, 7)
    for name in ("start_positions", "end_positions"):
        with pytest.raises(ValueError, match="both start_positions and end_positions"):
            model(ids, **{name: torch.tensor([1, 2, 3])})


@pytest.mark.parametrize(("variant", "settings"), [case for case, _ in CAUSAL], ids=[name for _, name in CAUSAL])
@torch.no_grad()
def test_a_mask_may_leave_the_past_out_only_where_nothing_of_it_was_padding(variant, settings):
    model, ids = build(variant, settings, "CausalLM"), inputs(3, 9)
    mask = torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], 1)
    cache = model(ids[:, :7], attention_mask=MASK).past_key_values
    for short in (None, mask[:, 7:]):
        with pytest.raises(ValueError, match=r"attention_mask must cover the 7 tokens in the cache.*= \(3, 9\)"):
            model(ids[:, 7:], attention_mask=short, past_key_values=cache)
    logits = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits[:, 7:])
    cache.reset()
    for start, short in ((0, None), (4, None), (7, mask[:, 7:])):  # the same object, with a past of real tokens
        stop = {0: 4, 4: 7, 7: 9}[start]
        logits = model(ids[:, start:stop], attention_mask=short, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 7:])


@pytest.mark.parametrize(
    ("variant", "settings", "causal"),
    [mode for mode in MODES if mode.id in ("full-default-encoder", "linear-default-causal")],
)
@torch.no_grad()
def test_traced_code_does_not_look_at_the_values_of_a_mask(variant, settings, causal, monkeypatch):
    model = build(variant, settings, "CausalLM" if causal else None, use_cache=False)
    ids, looked = inputs(3, 7), []
    monkeypatch.setattr(ops_checks, "bool", lambda x: looked.append(x), raising=False)
    program = torch.export.export(model, (ids,), {"attention_mask": MASK})
    assert not looked
    torch.testing.assert_close(program.module()(ids, attention_mask=MASK)[0], model(ids, attention_mask=MASK)[0])
