"""Published folders, the zoo's configs, what `list` and `describe` say of them, and refusals of `push`."""

import json
import os
import re
import shutil
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
from repository import ROOT
from safetensors.torch import load_file, save_file
from training_runs import MODEL, composed, each_variant_of, reset_accelerate, write_rows

from efficient_transformers import VARIANTS
from efficient_transformers.cards import costs_of, description_of, loading_code, measured
from efficient_transformers.cli import main
from efficient_transformers.exporting import code_version, export, public_files
from efficient_transformers.publishing import missing_for_push
from efficient_transformers.training.runs import check_published, publish, train
from efficient_transformers.training.settings import InputError

TINY = {
    "tokenizer": "data/tokenizer",
    "license": "apache-2.0",
    "model": {**MODEL, "hidden_dropout_prob": 0.0},
    "max_length": 24,
    "max_steps": 12,
    "batch_size": 8,
    "learning_rate": 0.03,
    "eval_steps": 12,
    "tracker": "none",
}


def trained(name, folder, **values):
    """A run of a config with the name of the zoo's."""
    path = folder / f"{name}.yaml"
    out = folder / f"{name}-local"
    path.write_text(yaml.safe_dump({**TINY, "out": str(out), **values}))
    with redirect_stdout(StringIO()):
        train.main(["--config", str(path), "--variant", "local"])
    reset_accelerate()
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny masked language model and the classifier that goes on from it, published."""
    folder = tmp_path_factory.mktemp("zoo")
    rows = [{"text": f"we are at {('peace ', 'war ')[i % 2] * (1 + i % 7)}", "era": "ab"[i % 2]} for i in range(60)]
    data = str(write_rows(folder / "documents.jsonl", rows))
    zoo = folder / "model_cards"
    texts = {
        "data": data,
        "more_data": [data],
        "frequency_bias": True,
        "variants": {"local": {"model": {"window_size": 5}}},
    }
    publish.publish(trained("zoo_mlm", folder, task="pretrain_mlm", **texts), zoo / "local-mlm")
    model = {"checkpoint": str(zoo / "local-mlm"), "standardize_pooled": True}
    publish.publish(
        trained("zoo_era", folder, task="classify", data=data, label_column="era", model=model), zoo / "local-era"
    )
    reset_accelerate()
    return folder / "model_cards" / "local-era"


def checked(*folders):
    """Exit code of the check, and what it says of each folder, by name."""
    command = [sys.executable, str(ROOT / "training/publish.py"), "--check", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


# --- publish.py


def test_weights_are_bfloat16_and_the_rest_is_there(published):
    tensors = load_file(published / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "pooler.norm" not in name} == {torch.bfloat16}
    assert tensors["model.pooler.norm.mean"].dtype == torch.float32
    names = {path.name for path in published.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "metrics.json", "settings.yaml", "pattern.png"} <= names
    assert not any(name.endswith(".py") for name in names)
    assert missing_for_push(published) == missing_for_push(published.with_name("local-mlm")) == []
    assert (published / "pattern.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_leaves_a_tokenizer_that_knows_the_length_of_the_model(published):
    run = published.parents[1] / "zoo_era-local"
    assert transformers.AutoTokenizer.from_pretrained(run).model_max_length == 64


def test_the_card_says_what_was_measured(published):
    card = ModelCard.load(published / "README.md")
    metrics = json.loads((published / "metrics.json").read_text())
    (accuracy,) = [r.metric_value for r in card.data.eval_results if r.metric_type == "accuracy"]
    windows = publish.test_windows(published, trust_remote_code=False)
    assert accuracy == metrics["test"]["accuracy"] == check_published.accuracy_of(published, windows)
    assert card.data.license == "apache-2.0"
    for text in (
        "https://arxiv.org/abs/2004.05150",  # paper, formula, picture, cost, training, command, beginning
        "S(i) = \\{j : |i-j| \\le w\\}",
        "(pattern.png)",
        "| 24 | ",
        "| seed | 0 |",
        "training/train.py --config",
        "| initialised from | et-local-mlm |",
    ):
        assert text in card.text
    assert card.data.model_name == "et-local-era"
    assert card.data.base_model == "et-local-mlm"
    assert card.data.efficient_transformers_version == code_version()["version"]


def test_a_card_is_written_again_from_what_lies_beside_it(published):
    card = (published / "README.md").read_text()
    (published / "README.md").write_text("")
    publish.main(["--cards", str(published)])
    assert (published / "README.md").read_text() == card


def test_a_check_finds_what_differs_from_the_card(published, tmp_path):
    """The folder as it is; with other weights; with another accuracy in its card; and without its tokenizer."""
    spoilt = {}
    for name in ("weights", "accuracy", "tokenizer"):
        spoilt[name] = tmp_path / name
        shutil.copytree(published, spoilt[name])
    weights = load_file(spoilt["weights"] / "model.safetensors")
    save_file(
        {key: value + 0.1 for key, value in weights.items()}, spoilt["weights"] / "model.safetensors", {"format": "pt"}
    )
    card = spoilt["accuracy"] / "README.md"
    stated = re.search(r"type: accuracy\n +value: (\S+)\n", card.read_text())
    card.write_text(card.read_text().replace(stated[0], stated[0].replace(stated[1], "0.123")))
    (spoilt["tokenizer"] / "tokenizer.json").unlink()
    code, said = checked(published, *spoilt.values())
    assert code == 1
    assert said["local-era"] == "matches its card"
    assert "its logits differ by" in said["weights"]
    assert "but its card says 0.123" in said["accuracy"]
    assert "it cannot be opened" in said["tokenizer"]


def test_published_models_do_what_their_cards_say():
    """A classifier, a masked and a causal model of the zoo, with the code of today."""
    folders = [ROOT / "model_cards" / name for name in ("linear-era", "longformer-mlm", "sinkhorn-clm")]
    code, said = checked(*folders)
    assert said == dict.fromkeys((folder.name for folder in folders), "matches its card")
    assert code == 0


def test_no_code_lies_in_the_folders_of_the_zoo():
    folders = [path for path in (ROOT / "model_cards").iterdir() if path.is_dir()]
    assert len(folders) == 2 * len(VARIANTS) + sum(variant.causal for variant in VARIANTS.values())
    for folder in folders:
        assert {path.suffix for path in folder.iterdir()} <= {".md", ".json", ".safetensors", ".png", ".yaml"}
        assert json.loads((folder / "metrics.json").read_text())["name"] == f"et-{folder.name}"
        config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == config["max_position_embeddings"]
        assert config["dtype"] == "float32"


def test_fine_tuning_a_published_model_moves_its_weights(tmp_path):
    """Loaded as the README shows, in float32; in the bfloat16 of the file most steps would be rounded away."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(ROOT / "model_cards" / "linear-era")
    rows = [{"input_ids": list(range(5, 69)), "labels": label} for label in (0, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=5e-5, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", warmup_steps=0,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    moved = total = 0
    for name, parameter in model.named_parameters():
        if name.endswith("word_embeddings.weight"):  # most words do not occur in two rows
            continue
        moved += (parameter != before[name]).sum().item()
        total += parameter.numel()
    assert moved > 0.9 * total


# --- export


def test_an_export_opens_without_the_package(published, tmp_path):
    """It has today's code, whatever code lay in the folder, and none of what training keeps for itself."""
    stale = tmp_path / "stale"
    shutil.copytree(published, stale)
    (stale / "base_backbone.py").write_text("raise ImportError")
    (stale / "sparse.py").write_text("raise ImportError")  # a module of an earlier version
    (stale / "checkpoints").mkdir()
    (stale / "checkpoints" / "optimizer.bin").write_bytes(b"moments")
    assert main(["export", str(stale), str(tmp_path / "out")]) == 0
    models = ROOT / "src" / "efficient_transformers" / "models"
    code = sorted(path.name for path in (tmp_path / "out").glob("*.py"))
    assert "modeling_local.py" in code
    assert "sparse.py" not in code
    for name in code:
        assert (tmp_path / "out" / name).read_bytes() == (models / name).read_bytes()
    assert not (tmp_path / "out" / "checkpoints").exists()
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.efficient_transformers_commit == code_version()["commit"]
    assert data.model_name == "et-local-era"


def test_a_tokenizer_keeps_its_own_code(published, tmp_path):
    shutil.copytree(published, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["words.Words", None]}}))
    (tmp_path / "model" / "words.py").write_text("from .letters import LETTERS\n")
    (tmp_path / "model" / "letters.py").write_text("LETTERS = 26\n")
    export(tmp_path / "model", tmp_path / "out")
    assert {"words.py", "letters.py", "modeling_local.py"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_model_of_another_kind_is_exported_as_it_is(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    export(tmp_path / "bert", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "bert" / "config.json").read_bytes()


def test_an_export_overwrites_nothing(published, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("mine")
    for folder, out, said in (
        (published, tmp_path, "is not an empty folder"),
        (published, published / "out", "is inside"),
        (tmp_path, tmp_path / "out", "config.json is missing"),
        (tmp_path / "nowhere", tmp_path / "out", "There is no folder"),
    ):
        assert main(["export", str(folder), str(out)]) == 2
        assert said in capsys.readouterr().err


def test_the_card_s_code_runs_as_it_stands(published, tmp_path):
    """In a fresh process without the package, beside the export that has the name of the card."""
    export(published, tmp_path / "et-local-era")
    (snippet,) = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "snippet.py").write_text(snippet)
    code = "import sys, runpy; sys.modules['efficient_transformers'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "snippet.py")],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() in ("a", "b"), done.stderr[-2000:]


def test_only_finished_runs_of_known_tasks_are_published(published, tmp_path):
    with pytest.raises(InputError, match="is the run itself"):
        publish.publish(published, published)
    with pytest.raises(InputError, match="contains no finished run"):
        publish.publish(tmp_path, tmp_path / "out")
    metrics = json.loads((published / "metrics.json").read_text())
    metrics["settings"]["config"] = "mqar/local"
    del metrics["settings"]["task"]  # as in older runs
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"is a run of the task recall; only"):
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
    assert measured(tmp_path, "local") == {"nats/byte": 1.25}
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
    assert main(["describe", "linear", "--length", "0"]) == 2
    assert "--length (0) must lie between 1 and" in capsys.readouterr().err


def test_what_training_keeps_for_itself_is_not_pushed(published, tmp_path):
    for name in ("checkpoints/step-1/optimizer.bin", "runs/events", "half.partial", "a/.cache/b"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [file.path for file in public_files(tmp_path)] == ["model.safetensors"]
    with pytest.raises(ValueError, match="There is no folder"):
        public_files(tmp_path / "nowhere")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = "; ".join(missing_for_push(tmp_path))
    assert "there is no config.json" in said
    assert "model-00001-of-00002.safetensors" in said
    assert "there is no model card" in said


# --- the zoo's configs


@each_variant_of("zoo_mlm", "zoo_clm")
def test_the_zoo_s_models_are_of_one_size(task, variant):
    task, settings = composed(task, variant)
    fields = dict(settings.model)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), vocab_size=4096, **fields)
    with torch.device("meta"):
        model = task.auto_class.from_config(config)
    # what a variant owns beside its projections may be as much as half of the rest, and in bfloat16 3.2 MB
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 2.5e6


@each_variant_of("zoo_era")
def test_a_classifier_starts_from_the_masked_model_of_its_variant(task, variant):
    _, settings = composed(task, variant)
    assert settings.model == {"checkpoint": f"model_cards/{variant}-mlm", "standardize_pooled": True}


def test_the_books_are_small_enough_for_the_repository():
    assert Path(ROOT / "data" / "books.parquet").stat().st_size < 4_000_000
