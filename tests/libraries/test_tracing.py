"""`torch.jit.trace` records values of its example as constants; a traced model still obeys every mask and size."""

import pytest
import torch
from zoo import MODES, SETTINGS, build, inputs, inputs_of, is_first, one_layer

from efficient_transformers import VARIANTS

TINY = {"hidden_size": 16, "intermediate_size": 22, "max_position_embeddings": 64}
# other shapes than the example's, too: the batch of one and lengths on both sides of blocks and windows
SHAPES = [(3, 30), (1, 30), (3, 29), (2, 1), (5, 9), (2, 64)]
SIDES = ["none", "right", "left", "holes"]

# A trace is checked by its results; the warnings are of sizes, which are the same for all inputs of a length.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]


def mask_of(batch: int, length: int, side: str) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    match side:
        case "right":
            mask[0, length // 2 + 1 :] = 0
        case "left":
            mask[-1, : length // 3] = 0
        case "holes":
            mask[:, length // 4 : length // 2] = 0
    return mask


def tiny(variant, settings, head=None, **changes):
    return build(variant, {**settings, **one_layer(settings)}, head, dtype=torch.float32, **TINY, **changes)


def traced(model, *example):
    return torch.jit.trace(model, example, strict=False, check_trace=False)


def first(outputs) -> torch.Tensor:
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]


RUNS = [
    pytest.param(
        *mode.values,
        implementation,
        id=f"{mode.id}-{implementation}",
        # one encoder of each variant stays in the quick set
        marks=() if is_first(mode) and mode.id.endswith("-encoder") and implementation == "sdpa" else pytest.mark.slow,
    )
    for mode in MODES
    for implementation in ("sdpa", "eager")
]


@pytest.mark.parametrize(("variant", "settings", "causal", "implementation"), RUNS)
@torch.no_grad()
def test_a_trace_obeys_masks_that_its_example_did_not_have(variant, settings, causal, implementation):
    head = "CausalLM" if causal else "TokenClassification"
    model = tiny(variant, settings, head, attn_implementation=implementation)
    recorded = traced(model, inputs(3, 30), mask_of(3, 30, "none"))
    for number, (batch, length) in enumerate(SHAPES):
        for side in SIDES if number == 0 else SIDES[1 + number % 3 :][:1]:
            ids, mask = inputs(batch, length), mask_of(batch, length, side)
            expected, actual = first(model(ids, mask)), first(recorded(ids, mask))
            assert actual.shape == expected.shape, (batch, length, side)
            assert (actual - expected).abs().max() < 1e-4, (batch, length, side)


@pytest.mark.slow
@pytest.mark.parametrize("slug", VARIANTS)
@torch.no_grad()
def test_every_head_can_be_traced(slug):
    variant = VARIANTS[slug]
    for head in (None, *variant.heads):
        model = tiny(variant, SETTINGS[slug][0], head)
        example, given = inputs_of(model, 2, 20), inputs_of(model, 3, 20)
        if given.is_floating_point():
            example, given = (example,), (given,)
        else:
            example, mask = (example, torch.ones_like(example)), torch.ones_like(given)
            mask[0, ..., :7] = 0
            given = given, mask
        expected, actual = first(model(*given)), first(traced(model, *example)(*given))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_trace_obeys_global_marks_that_its_example_did_not_have():
    model = tiny(VARIANTS["longformer"], SETTINGS["longformer"][0], "TokenClassification")
    ids, marks = inputs(2, 30), torch.zeros(2, 30, dtype=torch.long)
    marks[:, 5] = 1

    class Marked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, marks):
            return self.model(ids, global_attention_mask=marks).logits

    recorded = traced(Marked(), ids, marks)
    for positions in ([], [5], [2, 9, 29]):
        marks = torch.zeros_like(marks)
        marks[1, positions] = 1
        expected = model(ids, global_attention_mask=marks).logits
        torch.testing.assert_close(recorded(ids, marks), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_is_refused_where_it_cannot_be_exported():
    model, ids = tiny(VARIANTS["full"], {}, "CausalLM"), inputs(2, 8)
    with pytest.raises(ValueError, match="EtFullModel cannot be exported with a cache"):
        torch.export.export(model, (ids,), {"use_cache": True})


@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
def test_the_legacy_onnx_exporter_is_refused(tmp_path):
    model = tiny(VARIANTS["full"], {}, "SequenceClassification")
    example = inputs(2, 8), mask_of(2, 8, "none")
    with pytest.raises(ValueError, match=r"dynamo=False.*use dynamo=True"):
        torch.onnx.export(model, example, tmp_path / "model.onnx", dynamo=False)
