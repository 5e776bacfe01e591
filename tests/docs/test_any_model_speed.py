"""The benchmark of whole models runs, and goes on where it was."""

import json

import any_model
from transformers import BertConfig, MistralConfig

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_the_benchmark_writes_its_table_and_goes_on(tmp_path, monkeypatch, capsys):
    shapes = {
        "bert": lambda: BertConfig(**any_model.TOKENS, **SIZES),
        "mistral": lambda: MistralConfig(**any_model.TOKENS, **SIZES, num_key_value_heads=1, sliding_window=8),
    }
    monkeypatch.setattr(any_model, "SHAPES", shapes)
    options = ["--out", str(tmp_path / "speed"), "--repeats", "1", "--unequal", "64"]
    any_model.main([*options, "--lengths", "32"])
    any_model.main([*options, "--lengths", "32", "64"])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * (4 + 3)  # of BERT four contenders, of Mistral three, in two modes
    assert {row["contender"] for row in rows} == {"sdpa", "eager", "efficient", any_model.RULE}
    assert all(row["median"] > 0 for row in rows)
    page = (tmp_path / "speed.md").read_text()
    assert page.count("| mistral | efficient |") == 4
    assert "N = 64" in page
