"""ONNX export of some variants: run by onnxruntime, at the traced length and at others, equal to torch."""

import numpy as np
import onnxruntime
import pytest
import torch
from zoo import build, inputs

from efficient_transformers import VARIANTS

SEPARATOR = 5
CASES = {
    "longformer-classes": ("longformer", "SequenceClassification", {"attention_window": 6}, ()),
    "longformer-question": ("longformer", "QuestionAnswering", {"attention_window": 6, "sep_token_id": SEPARATOR}, ()),
    "longformer-marked": ("longformer", "TokenClassification", {"attention_window": 6}, ("global_attention_mask",)),
    "big_bird-drawn": ("big_bird", "SequenceClassification", {"block_size": 4, "num_random_blocks": 2}, ()),
    "big_bird-stored": ("big_bird", "MaskedLM", {"block_size": 4, "random_blocks": "stored"}, ()),
    "fnet": ("fnet", "SequenceClassification", {}, ()),
    "gmlp": ("gmlp", "SequenceClassification", {"tiny_attention_size": 5}, ()),
    "mlp_mixer": ("mlp_mixer", "TokenClassification", {}, ()),
}


def arguments(length: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Two rows, one padded on the left, each with a separator; one token marked as global where that is asked for."""
    ids, mask = inputs(2, length), torch.ones(2, length, dtype=torch.long)
    ids[:, length // 2] = SEPARATOR
    mask[0, : length // 3] = 0
    marked = torch.zeros_like(mask)
    marked[:, length - 1] = 1
    return {"input_ids": ids, "attention_mask": mask, **dict.fromkeys(names, marked)}


QUICK = ("longformer-question", "big_bird-drawn", "fnet")
RUNS = [
    pytest.param(*case, dynamic, marks=() if dynamic and name in QUICK else pytest.mark.slow, id=f"{name}-{how}")
    for name, case in CASES.items()
    for how, dynamic in (("fixed", False), ("dynamic", True))
]


@pytest.mark.parametrize(("slug", "head", "settings", "names", "dynamic"), RUNS)
def test_onnx_agrees_with_torch(slug, head, settings, names, dynamic, tmp_path):
    model = build(VARIANTS[slug], settings, head, dtype=torch.float32, num_hidden_layers=1)
    sample = arguments(50, names)
    n = torch.export.Dim("n", min=2, max=128)
    shapes = {name: {1: n} for name in sample} if dynamic else None
    exported = torch.onnx.export(model, (), kwargs=sample, dynamic_shapes=shapes, dynamo=True, verbose=False)
    exported.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for length in (2, 7, 50, 97, 128) if dynamic else (50,):
        given = arguments(length, names)
        with torch.no_grad():
            expected = model(**given).to_tuple()[0].numpy()
        actual = session.run(None, {name: value.numpy() for name, value in given.items()})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
