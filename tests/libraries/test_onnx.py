"""torch.export and ONNX with a dynamic batch and length: in torch and in onnxruntime, at sizes not exported."""

import numpy as np
import onnxruntime
import pytest
import torch
from zoo import MODES, SETTINGS, build, inputs, inputs_of, is_first, one_layer

from efficient_transformers import VARIANTS

SEPARATOR = 5
LONGEST = 200  # several tiles of 64, so that their number is symbolic, too
TINY = {"hidden_size": 16, "intermediate_size": 22, "max_position_embeddings": LONGEST}
SIZES = [(3, 30), (1, 30), (2, 1), (5, 9), (1, LONGEST)]
NO_PROGRAM = {"fnet"}  # the program of its fast transform has complex numbers, which ONNX lacks: it takes the model


def arguments(model, batch: int, length: int, names: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Rows padded on the left, on both sides and on the right, a separator, and a mark where marks are asked for."""
    ids = inputs_of(model, batch, length)
    if ids.is_floating_point():
        return {"pixel_values": ids}
    mask = torch.ones_like(ids)
    ids[..., length // 2] = SEPARATOR
    mask[0, ..., : length // 3] = 0
    mask[-1, ..., length - length // 4 :] = 0
    marked = torch.zeros_like(mask)
    marked[..., length // 2] = 1
    return {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(names, marked)}


def dynamic(sample: dict[str, torch.Tensor]) -> dict:
    """Batch and length of each input, as far as it has them, are free."""
    batch = torch.export.Dim("batch", min=1, max=64)
    length = torch.export.Dim("length", min=1, max=LONGEST)
    return {name: {0: batch} if x.dim() == 4 else {0: batch, x.dim() - 1: length} for name, x in sample.items()}


def first(outputs) -> np.ndarray:
    return next(iter(outputs.values())).numpy()


@torch.no_grad()
def check(model, run, names=(), sizes=SIZES):
    for batch, length in sizes:
        given = arguments(model, batch, length, names)
        np.testing.assert_allclose(run(given), first(model(**given)), rtol=1e-4, atol=1e-4, err_msg=f"{batch, length}")


def check_program(model, names=()) -> torch.export.ExportedProgram:
    sample = arguments(model, 3, 30, names)
    program = torch.export.export(model, (), kwargs=sample, dynamic_shapes=dynamic(sample))
    module = program.module()
    check(model, lambda given: first(module(**given)), names)
    return program


def check_onnx(model, program, path, names=()):
    sample = arguments(model, 3, 30, names)
    options = {} if program is not None else {"kwargs": sample, "dynamic_shapes": dynamic(sample)}
    torch.onnx.export(program or model, (), **options, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    check(model, lambda given: session.run(None, {name: x.numpy() for name, x in given.items()})[0], names)


def tiny(variant, settings, head, **changes):
    return build(variant, {**settings, **one_layer(settings), **TINY}, head, dtype=torch.float32, **changes)


def marks(case: str) -> tuple:
    return () if case in ("linear-default-encoder", "big_bird-drawn_blocks-encoder") else (pytest.mark.slow,)


FIRST = [pytest.param(*m.values, id=m.id, marks=marks(m.id)) for m in MODES if is_first(m)]
OTHERS = [m for m in MODES if not is_first(m)]


@pytest.mark.parametrize(("variant", "settings", "causal"), FIRST)
def test_every_variant_runs_in_torch_and_onnxruntime(variant, settings, causal, tmp_path):
    """Encoders with a pooled head, decoders with `use_cache` as it comes."""
    model = tiny(variant, settings, "CausalLM" if causal else "SequenceClassification")
    program = check_program(model)
    check_onnx(model, None if variant.slug in NO_PROGRAM else program, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "settings", "causal"), OTHERS)
def test_every_setting_is_exported(variant, settings, causal):
    check_program(tiny(variant, settings, "CausalLM" if causal else "TokenClassification"))


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["full", "longformer", "sinkhorn"])
def test_every_head_is_exported(slug):
    variant = VARIANTS[slug]
    for head in (None, *variant.heads):
        check_program(tiny(variant, SETTINGS[slug][0], head))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_implementations_are_exported(implementation):
    for slug in ("local", "big_bird", "mixed"):
        settings = {key: value for key, value in SETTINGS[slug][0].items() if key != "random_blocks"}
        check_program(tiny(VARIANTS[slug], settings, "TokenClassification", attn_implementation=implementation))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice", "ImageClassification"])
def test_every_pooling_runs_in_onnxruntime(head, pooling, tmp_path):
    model = tiny(VARIANTS["linear"], {}, head, classifier_pooling=pooling)
    check_onnx(model, check_program(model), tmp_path / "model.onnx")


CASES = {
    "longformer-classes": ("longformer", "SequenceClassification", {"attention_window": 6}, ()),
    "longformer-question": ("longformer", "QuestionAnswering", {"attention_window": 6, "sep_token_id": SEPARATOR}, ()),
    "longformer-marked": ("longformer", "TokenClassification", {"attention_window": 6}, ("global_attention_mask",)),
    "big_bird-stored": ("big_bird", "MaskedLM", {"block_size": 4, "random_blocks": "stored"}, ()),
    "big_bird-external": ("big_bird", "TokenClassification", SETTINGS["big_bird"][1], ()),
    "gmlp-tiny-attention": ("gmlp", "SequenceClassification", {"tiny_attention_size": 5}, ()),
    "reformer-across": ("reformer", "MaskedLM", SETTINGS["reformer"][2], ()),
}
QUICK = ("longformer-question",)


@pytest.mark.parametrize(
    ("slug", "head", "settings", "names"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_special_cases_run_in_onnxruntime(slug, head, settings, names, tmp_path):
    model = tiny(VARIANTS[slug], settings, head)
    check_onnx(model, check_program(model, names), tmp_path / "model.onnx", names)


@pytest.mark.slow
def test_onnx_at_a_fixed_size_has_no_free_axes(tmp_path):
    model = tiny(VARIANTS["longformer"], {"attention_window": 6}, "SequenceClassification")
    sample = {"input_ids": inputs(2, 50), "attention_mask": torch.ones(2, 50, dtype=torch.long)}
    torch.onnx.export(model, (), kwargs=sample, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert all(given.shape == [2, 50] for given in session.get_inputs())
    check(
        model,
        lambda given: session.run(None, {name: x.numpy() for name, x in given.items()})[0],
        sizes=[(2, 50)],
    )
