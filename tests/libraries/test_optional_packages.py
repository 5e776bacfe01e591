"""Importing the package needs torch, transformers, safetensors and huggingface_hub, and no optional package."""

import subprocess
import sys

import pytest

OPTIONAL = [
    "PIL", "torchvision", "torchaudio", "matplotlib", "accelerate", "datasets", "evaluate", "sklearn", "tensorboard",
    "peft", "trl", "onnx", "onnxscript", "onnxruntime", "sentence_transformers", "gradio", "selenium", "fla",
    "starlette", "uvicorn", "timm", "sentencepiece",
]  # fmt: skip
USE = """
import sys
for name in {absent!r}:
    sys.modules[name] = None  # an import of it now fails as if it were not installed
import torch, transformers
import efficient_transformers as zoo
assert all(hasattr(zoo, name) for name in zoo.__all__)
for auto in (transformers.AutoModelForMaskedLM, transformers.AutoModelForImageClassification):
    config = transformers.AutoConfig.for_model("et_local", image_size=[4, 4] if "Image" in auto.__name__ else None,
                                               patch_size=2, vocab_size=9, hidden_size=8, num_hidden_layers=1)
    model = auto.from_config(config)
    x = torch.ones(1, 3, 4, 4) if config.image_size else torch.ones(1, 5, dtype=torch.long)
    assert model(x).logits.isfinite().all()
assert "PIL" in {absent!r} or zoo.EtImageProcessor.for_model(config).size["height"] == 4
"""


@pytest.mark.parametrize(
    "absent", [["PIL", "torchvision"], ["torchvision"], OPTIONAL], ids=["vision", "torchvision", "all"]
)
def test_importing_needs_no_optional_package(absent):
    code = USE.format(absent=absent)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
