"""The README's code runs as it stands, and its table is the table of variants."""

import re
from pathlib import Path

import torch
from transformers import AutoTokenizer
from zoo import build

from efficient_transformers import VARIANTS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"vocab_size": 4096, "num_labels": 6, "max_position_embeddings": 4096, "dtype": torch.float32}
    build(VARIANTS["local"], {}, "SequenceClassification", **fields).save_pretrained("runs/era-local")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained("runs/era-local")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (1, 6)
    assert {"config.json", "model.safetensors", "modeling_local.py", "tokenizer.json"} <= {
        path.name for path in Path("runs/fine-tuned").iterdir()
    }


def test_its_table_is_that_of_the_variants():
    rows = re.findall(r"^\| `et_(\w+)` \| .* \| \[([\d.]+)\]\(\S+\) \| (.*) \| (yes|no) \|$", README, re.M)
    said = {slug: (f"arXiv:{paper}", cost, causal == "yes") for slug, paper, cost, causal in rows}
    assert said == {slug: (v.paper, v.cost, v.causal) for slug, v in VARIANTS.items()}
