"""The README's code runs as it stands. Its table of variants is checked in test_registry.py."""

import re
from pathlib import Path

from repository import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model_cards").symlink_to(ROOT / "model_cards")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (1, 6)
    assert {"config.json", "model.safetensors", "modeling_linear.py", "tokenizer.json"} <= {
        path.name for path in Path("runs/fine-tuned").iterdir()
    }
