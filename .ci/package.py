"""Use an installed package as a new user would: build, save, load and compare a model. Run by `.ci/package`."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

import efficient_transformers

where = Path(efficient_transformers.__file__)
if Path(sys.prefix) not in where.parents:
    sys.exit(f"{where} is not inside {sys.prefix}: the imported package is not the installed one.")
config = AutoConfig.for_model(
    "et_longformer", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = AutoModelForMaskedLM.from_config(config).eval()
ids = torch.randint(5, 99, (2, 300))
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    again = AutoModelForMaskedLM.from_pretrained(folder).eval()
    if not torch.equal(model(ids).logits, again(ids).logits):
        sys.exit("The logits of the loaded model differ from those of the saved model.")
print(f"efficient_transformers {efficient_transformers.__version__} works from {where.parent}")
