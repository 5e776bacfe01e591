"""The page "Use it inside any model" runs as it stands, with tiny models under the names that it loads."""

import re

import pytest
import torch
from host_models import SIZES, model_of
from repository import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from efficient_transformers.any_model.report import attention_report
from efficient_transformers.cli import main

PAGE = (ROOT / "docs" / "any_model.md").read_text(encoding="utf-8")


def save(name: str, kind: str, head, **settings) -> None:
    model_of(kind, head, hidden_size=16, intermediate_size=32, head_dim=4, **settings).save_pretrained(name)
    words = ["<pad>", "<unk>", "the", "union", "of", "states", "a", "short", "one"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(name)


def test_its_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    window = {"local_attention": 16, "global_attn_every_n_layers": 2, "max_position_embeddings": 8192}
    save("answerdotai/ModernBERT-base", "modernbert", AutoModel, **window)
    save(
        "FacebookAI/xlm-roberta-base", "xlm-roberta", AutoModelForMaskedLM, max_position_embeddings=514, pad_token_id=1
    )
    save("openai-community/gpt2", "gpt2", AutoModelForCausalLM, max_position_embeddings=128)
    modern, xlmr, gpt2 = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(modern, names)
    assert names["batch"].input_ids.shape == (2, 8192)
    assert torch.isfinite(names["vectors"]).all()
    expected = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="sdpa").eval()
    with torch.no_grad():
        short = expected(**{name: x[1:, :3] for name, x in names["batch"].items()}).last_hidden_state
    torch.testing.assert_close(names["hidden"][1:, :3], short, atol=1e-4, rtol=1e-4)
    exec(xlmr, names)
    config = names["model"].config
    assert config.max_position_embeddings == 4098
    assert config.efficient_attention == {"pattern": "local:256 | global:1:1"}
    assert config._attn_implementation == "efficient"
    names["model"](torch.randint(3, 99, (1, 4096)))
    exec(gpt2, names)
    assert names["text"].shape == (1, 55)


def test_its_numbers_of_pairs():
    """Multiplications of the report, by hand."""
    model = model_of("modernbert", local_attention=8, global_attn_every_n_layers=2)
    full, window = attention_report(model.config, 100)
    heads, size = 4, 2 * 8
    assert (full.engine, window.engine) == ("SDPA, rows at their own length", "tiled")
    assert full.before == full.after == window.before == heads * size * 100**2
    inside = sum(1 for i in range(100) for j in range(100) if abs(i - j) <= 4)
    assert window.after == heads * size * inside
    assert "window of 9 tokens, bidirectional" in window.asks
    causal = attention_report(model_of("llama").config, 100)
    assert [layer.before for layer in causal] == [heads * size * 100 * 101 // 2] * 2
    (ruled, _) = attention_report(model_of("llama").config, 100, "local:4 | global:2")
    assert ruled.after == heads * size * sum(min(i + 1, 5) + max(0, min(2, i - 4)) for i in range(100))
    (kernel, _) = attention_report(model_of("bert").config, 100, "performer:32")
    assert kernel.after == heads * 100 * (2 * 32 * 8 + 2 * 32 * 8)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("mistral", ["window of 8 tokens, causal", "tiled"]), ("gemma2", ["eager attention", "softcap"]),
     ("t5", ["position_bias"]), ("llama4_text", ["chunked_overlay"]), ("mixtral", ["tiled"])],
)  # fmt: skip
def test_the_command(kind, words, tmp_path, capsys):
    settings = {**SIZES, "intermediate_size": 64, "sliding_window": 8, "num_local_experts": 2}
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["attention", str(tmp_path), "--length", "100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("layer")
    for word in words:
        assert word in out


def test_the_command_refuses_what_set_attention_refuses(tmp_path, capsys):
    AutoConfig.for_model("mpnet", **SIZES).save_pretrained(tmp_path)
    assert main(["attention", str(tmp_path)]) == 2
    assert "attention interface" in capsys.readouterr().err
    AutoConfig.for_model("t5", **SIZES).save_pretrained(tmp_path)
    assert main(["attention", str(tmp_path), "--pattern", "local:4"]) == 2
    assert "cross-attention" in capsys.readouterr().err
