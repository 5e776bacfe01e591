"""Published folders, the zoo's configs, what `list` and `describe` say of them, and refusals of `push`."""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training_runs import ROOT, reset_accelerate, write_rows

from efficient_transformers import VARIANTS
from efficient_transformers.cards import costs_of, description_of, loading_code, measured
from efficient_transformers.cli import main
from efficient_transformers.publishing import files_to_push, missing_for_push

sys.path.insert(0, str(ROOT / "training"))

import check_published
import classify
import pretrain_mlm
import publish
from settings import InputError, merge, read_yaml

TINY = {
    "tokenizer": "data/tokenizer",
    "license": "apache-2.0",
    "model": {
        "model_type": "et_local",
        "window_size": 5,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
    },
    "max_length": 24,
    "max_steps": 12,
    "batch_size": 8,
    "learning_rate": 0.03,
    "eval_steps": 12,
    "tracker": "none",
}
ZOO = {task: sorted((ROOT / "configs" / task).glob("*.yaml")) for task in ("zoo_mlm", "zoo_era", "zoo_clm")}


def train(task, script, folder, **values):
    """A run of a config in a folder with the name of the zoo's, by which publish.py knows the script."""
    path = folder / task / "local.yaml"
    path.parent.mkdir()
    out = folder / f"{task}-local"
    path.write_text(yaml.safe_dump({**TINY, "out": str(out), **values}))
    with redirect_stdout(StringIO()):
        script.main(["--config", str(path)])
    reset_accelerate()
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny masked language model and the classifier that goes on from it, published."""
    folder = tmp_path_factory.mktemp("zoo")
    rows = [{"text": f"we are at {('peace ', 'war ')[i % 2] * (1 + i % 7)}", "era": "ab"[i % 2]} for i in range(60)]
    data = str(write_rows(folder / "documents.jsonl", rows))
    zoo = folder / "model_cards"
    texts = {"data": data, "more_data": [data], "frequency_bias": True}
    publish.publish(train("zoo_mlm", pretrain_mlm, folder, **texts), zoo / "local-mlm")
    model = {"checkpoint": str(zoo / "local-mlm"), "standardize_pooled": True}
    publish.publish(train("zoo_era", classify, folder, data=data, label_column="era", model=model), zoo / "local")
    reset_accelerate()
    return folder / "model_cards" / "local"


def checked(*folders):
    """Exit code and output of the check, which is a process of its own."""
    command = [sys.executable, check_published.__file__, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    return done.returncode, done.stdout + done.stderr[-3000:]


# --- publish.py


def test_weights_are_bfloat16_and_the_rest_is_there(published):
    tensors = load_file(published / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "pooler.norm" not in name} == {torch.bfloat16}
    assert tensors["model.pooler.norm.mean"].dtype == torch.float32
    names = {path.name for path in published.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "modeling_local.py", "metrics.json", "pattern.png"} <= names
    assert missing_for_push(published) == missing_for_push(published.with_name("local-mlm")) == []
    assert (published / "pattern.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_says_what_was_measured(published):
    card = ModelCard.load(published / "README.md")
    metrics = json.loads((published / "metrics.json").read_text())
    (accuracy,) = [r.metric_value for r in card.data.eval_results if r.metric_type == "accuracy"]
    assert accuracy == metrics["test"]["accuracy"] == check_published.accuracy_of(published)
    assert card.data.license == "apache-2.0"
    for text in (
        "https://arxiv.org/abs/2004.05150",  # paper, formula, picture, cost, training, command, beginning
        "S(i) = \\{j : |i-j| \\le w\\}",
        "(pattern.png)",
        "| 24 | ",
        "| seed | 0 |",
        "training/classify.py --config",
        "| goes on from | local-mlm |",
    ):
        assert text in card.text


def test_a_check_finds_what_is_not_as_the_card_says(published, tmp_path):
    """The folder as it is; with other weights; with another accuracy in its card; and without its code."""
    spoilt = {}
    for name in ("weights", "accuracy", "code"):
        spoilt[name] = tmp_path / name
        spoilt[name].mkdir()
        for path in published.iterdir():
            (spoilt[name] / path.name).write_bytes(path.read_bytes())
    weights = load_file(spoilt["weights"] / "model.safetensors")
    save_file(
        {key: value + 0.1 for key, value in weights.items()}, spoilt["weights"] / "model.safetensors", {"format": "pt"}
    )
    card = spoilt["accuracy"] / "README.md"
    stated = re.search(r"type: accuracy\n +value: (\S+)\n", card.read_text())
    card.write_text(card.read_text().replace(stated[0], stated[0].replace(stated[1], "0.123")))
    (spoilt["code"] / "modeling_local.py").unlink()
    code, said = checked(published, *spoilt.values())
    lines = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    assert code == 1
    assert lines[str(published)] == "as its card says"
    assert "its logits differ by" in lines[str(spoilt["weights"])]
    assert "and not 0.123, as its card says" in lines[str(spoilt["accuracy"])]
    assert "it cannot be opened" in lines[str(spoilt["code"])]


def test_the_card_s_code_runs_as_it_stands(published, tmp_path):
    """In a fresh process without the package, from the folder in which the model lies."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "snippet.py").write_text(snippet)
    code = "import sys, runpy; sys.modules['efficient_transformers'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "snippet.py")],
        cwd=published.parent, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() in ("a", "b"), done.stderr[-2000:]


def test_only_finished_runs_of_known_scripts_are_published(published, tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        publish.publish(tmp_path, tmp_path / "out")
    metrics = json.loads((published / "metrics.json").read_text())
    metrics["settings"]["config"] = "mqar/local"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"was trained by recall.py; what can be published"):
        publish.publish(tmp_path, tmp_path / "out")


# --- cards and costs


@pytest.mark.parametrize("slug", VARIANTS)
def test_every_variant_describes_itself(slug):
    variant = VARIANTS[slug]
    with torch.device("meta"):
        model = variant.model_class()(variant.config_class(hidden_size=8, num_hidden_layers=0, vocab_size=5))
    text = description_of(model)
    assert variant.paper.removeprefix("arXiv:") in text
    assert ".. math" not in text
    assert ":math:" not in text
    assert text.count("$$") in (0, 2)


def test_costs_are_counted_for_each_length():
    config = VARIANTS["linear"].config_class(max_position_embeddings=4096)
    costs = costs_of(config, 3000)
    assert list(costs) == [512, 1024, 2048, 3000]
    assert [flops / costs[512][0] for flops, _ in costs.values()] == [1, 2, 4, 3000 / 512]
    assert [full / costs[512][1] for _, full in costs.values()] == [1, 4, 16, (3000 / 512) ** 2]
    assert costs_of(transformers.BertConfig(), 512) == {}


@pytest.mark.parametrize("auto_class", ["AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"])
def test_printed_code_opens_nothing_with_a_question(auto_class):
    code = loading_code("folder", auto_class, 64)
    assert code.count("from_pretrained(") == code.count("trust_remote_code=True") == 2


# --- the command line


def test_list_shows_the_zoo(published, capsys, tmp_path):
    assert main(["list", "--cards", str(published.parent)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-5:] == ["parameters", "era", "accuracy", "nats/byte", "tokens/s"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows.keys() == VARIANTS.keys()
    metrics = json.loads((published / "metrics.json").read_text())
    assert rows["local"][-4] == f"{metrics['model']['parameters']:,}"
    assert rows["local"][-3] == f"{metrics['test']['accuracy']:.3f}"
    assert rows["local"][-2] == "-"  # no causal one was trained
    assert rows["linear"][-4:] == ["-"] * 4
    (tmp_path / "local-clm").mkdir()
    (tmp_path / "local-clm" / "metrics.json").write_text('{"test": {"nats_per_byte": 1.25}}')
    assert measured(tmp_path / "local") == {"nats/byte": 1.25}
    assert main(["list", "--cards", str(tmp_path / "nowhere")]) == 0
    assert "local " in capsys.readouterr().out


def test_describe_gives_costs_at_a_length(published, capsys, tmp_path):
    assert main(["describe", "local", "--length", "2048", "--cards", str(published.parent)]) == 0
    said = capsys.readouterr().out
    assert "1 layers, hidden size 16, 2 heads and 2,048 positions" in said  # the zoo's config, made longer
    assert re.search(r"^\| 2,048 \|( [\d.,]+ \|){4}$", said, re.M)
    assert "era accuracy" in said
    assert main(["describe", "linear", "hidden_size=8", "num_attention_heads=2", "--cards", str(tmp_path)]) == 0
    assert "hidden size 8, 2 heads and 4,096 positions" in capsys.readouterr().out
    assert main(["describe", "linear", "--length", "0"]) == 1
    assert "--length (0) must be at least 1" in capsys.readouterr().err


def test_what_training_keeps_for_itself_is_not_pushed(published, tmp_path):
    for name in ("checkpoints/step-1/optimizer.bin", "runs/events", "half.partial", "a/.cache/b", "model.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert [file.path for file in files_to_push(tmp_path)] == ["model.safetensors"]
    with pytest.raises(ValueError, match="There is no folder"):
        files_to_push(tmp_path / "nowhere")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = "; ".join(missing_for_push(tmp_path))
    assert "there is no config.json" in said
    assert "model-00001-of-00002.safetensors" in said
    assert "there is no model card" in said


# --- the zoo's configs


def test_the_zoo_has_every_variant_once():
    stems = {task: {path.stem for path in paths} - {"base"} for task, paths in ZOO.items()}
    assert stems["zoo_mlm"] == stems["zoo_era"] == VARIANTS.keys()
    assert stems["zoo_clm"] == {slug for slug, variant in VARIANTS.items() if variant.causal}


@pytest.mark.parametrize("task", ["zoo_mlm", "zoo_clm"])
def test_the_zoo_s_models_are_of_one_size(task):
    auto_class = transformers.AutoModelForMaskedLM if task == "zoo_mlm" else transformers.AutoModelForCausalLM
    base = read_yaml(ROOT / "configs" / task / "base.yaml")
    for path in ZOO[task]:
        if path.stem != "base":
            fields = dict(merge(base, read_yaml(path))["model"])
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), vocab_size=4096, **fields)
            with torch.device("meta"):
                model = auto_class.from_config(config)
            # what a variant owns beside its projections may be as much as half of the rest, and in bfloat16 3.2 MB
            assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 2.5e6, path


def test_a_classifier_goes_on_from_the_masked_model_of_its_variant():
    for path in ZOO["zoo_era"]:
        if path.stem != "base":
            assert read_yaml(path)["model"]["checkpoint"] == f"model_cards/{path.stem}-mlm"
    assert Path(ROOT / "data" / "books.parquet").stat().st_size < 4_000_000
