"""torch.export and torch.compile: one graph, the same numbers as in eager mode."""

import pytest
import torch
from zoo import CASES, IDS, SETTINGS, build, every_variant, inputs, one_layer

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.slow
def test_flex_attention_is_a_part_of_a_compiled_model():
    torch.compiler.reset()
    model = build(VARIANTS["local"], {"window_size": 3}, dtype=torch.float32, hidden_size=64)
    model.set_attn_implementation("flex_attention")
    ids, mask = padded(50)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(2)
@every_variant
def test_export_at_a_fixed_length_agrees_with_eager(variant):
    """torch.export without a guard on values."""
    for settings in SETTINGS[variant.slug][:2]:
        model = build(variant, settings, dtype=torch.float32, **one_layer(settings))
        ids, mask = padded(50)
        program = torch.export.export(model, (ids,), {"attention_mask": mask})
        compare_program(program, model, [50, 50])


# sympy cannot solve for the length where a stride without limit divides it
ANY_LENGTH = [(case, name) for case, name in zip(CASES, IDS, strict=True) if case[1].get("hops", 0) is not None]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("variant", "settings"), [case for case, _ in ANY_LENGTH], ids=[name for _, name in ANY_LENGTH]
)
def test_export_at_any_length_agrees_with_eager(variant, settings):
    """One program for all lengths from 2 on; behind external tokens the length is checked when it runs."""
    model = build(variant, settings, dtype=torch.float32, **one_layer(settings))
    n = torch.export.Dim("n", min=2, max=model.config.max_position_embeddings)
    ids, mask = padded(50)
    derived = bool(getattr(model.config, "num_external_tokens", 0)) or "stride" in settings
    program = torch.export.export(
        model,
        (ids,),
        {"attention_mask": mask},
        dynamic_shapes={"input_ids": {1: n}, "attention_mask": {1: n}},
        prefer_deferred_runtime_asserts_over_guards=derived,
    )
    compare_program(program, model, [2, 7, 50, 119])


def compare_program(program, model, lengths):
    for length in lengths:
        ids, mask = padded(length)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).last_hidden_state
            exported = program.module()(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)


def padded(length):
    """Two rows, one of them padded on the left."""
    ids, mask = inputs(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : int(torch.randint(length, ()))] = 0
    return ids, mask


@pytest.mark.sampled(2)
@every_variant
def test_compile_is_one_graph_and_agrees_with_eager(variant):
    torch.compiler.reset()  # all variants share the encoder's code, of which torch keeps eight compiled versions
    model = build(variant, SETTINGS[variant.slug][0], dtype=torch.float32)
    ids, mask = padded(50)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
