"""Training a classifier: its settings, its output folder, its evaluation, and the command line."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import yaml
from huggingface_hub import ModelCard
from repository import ROOT
from training_runs import composed, each_variant_of, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from efficient_transformers.cards import loading_code
from efficient_transformers.training.engine.building import build_config, build_model, load_tokenizer
from efficient_transformers.training.engine.loop import make_optimizer
from efficient_transformers.training.engine.outputs import differences
from efficient_transformers.training.runs import bag_of_words
from efficient_transformers.training.tasks import classify
from efficient_transformers.training.tasks.classify import ClassifySettings


def test_a_bag_of_words_reads_what_the_model_would(config, capsys):
    bag_of_words.main(["--config", str(config)])
    scores = json.loads(capsys.readouterr().out)
    assert {name: split["accuracy"] for name, split in scores.items()} == dict.fromkeys(scores, 1.0)
    assert sum(split["n"] for split in scores.values()) == 60
    short = ["--config", str(config), "--max_length=5"]  # [CLS], "we are at", [SEP]
    bag_of_words.main([*short, "--long_documents=truncate"])
    assert json.loads(capsys.readouterr().out)["train"]["accuracy"] < 0.7
    bag_of_words.main(short)
    assert json.loads(capsys.readouterr().out) == scores  # the windows of a document, joined


# --- settings that need a model


@each_variant_of("era", "arxiv", "imdb")
def test_every_config_builds_a_tiny_model(task, variant):
    _, settings = composed(task, variant)
    settings.model |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    tokenizer = load_tokenizer(settings)
    config = build_config(settings, tokenizer, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    model = build_model(settings, config, AutoModelForSequenceClassification)
    text = "a " * min(300, config.max_position_embeddings // 3)
    logits = model(**tokenizer([text, "b"], padding=True, return_tensors="pt")).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert {key: getattr(config, key) for key in settings.model} == settings.model


@pytest.mark.parametrize(("task", "variant"), [("era", "minilm"), ("zoo_era", "local")])
def test_configs_that_start_from_a_checkpoint_open_one(task, variant, finished):
    _, settings = composed(task, variant, f"--model.checkpoint={finished[0]}", "--tokenizer=null")
    config = build_config(settings, load_tokenizer(settings))
    assert build_model(settings, config, AutoModelForSequenceClassification).config.hidden_size == 16


def test_weights_that_a_checkpoint_does_not_bring_may_have_a_rate_of_their_own(finished, tmp_path):
    values = {
        "data": "era",
        "model": {"checkpoint": str(finished[0])},
        "learning_rate": 1e-5,
        "head_learning_rate": 0.1,
    }
    settings = ClassifySettings.from_dict(values)
    labels = {n: str(n) for n in range(5)}  # other ones than the checkpoint's, so the classifier is made anew
    config = build_config(
        settings, load_tokenizer(settings), id2label=labels, label2id={y: n for n, y in labels.items()}
    )
    model = build_model(settings, config, AutoModelForSequenceClassification)
    rates = {id(p): group["lr"] for group in make_optimizer(model, settings).param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name for name, rate in found.items() if rate == 0.1} == {"classifier.weight", "classifier.bias"}
    assert set(found.values()) == {0.1, 1e-5}
    settings.head_learning_rate = None
    assert {group["lr"] for group in make_optimizer(model, settings).param_groups} == {1e-5}


# --- a finished run


def test_the_output_folder_is_ready_for_the_hub(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"modeling_local.py", "base_backbone.py"} < {name for name in names if name.endswith(".py")}
    assert {name for name in names if not name.endswith(".py")} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json",
        "settings.yaml", "runs", "checkpoints",
    }  # fmt: skip
    assert list((folder / "runs").rglob("events.out.tfevents.*"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "peace", 1: "war"}
    assert model.config.label2id == {"peace": 0, "war": 1}
    assert len(AutoTokenizer.from_pretrained(folder)) == 4096


def test_the_model_has_learnt(finished):
    found = json.loads((finished[0] / "metrics.json").read_text())
    assert found["test"]["accuracy"] == found["test"]["macro_f1"] == 1.0
    assert found["test"]["n"] == 9
    assert found["training"]["steps"] == 24
    assert found["training"]["tokens"] > 42 * 5 * 4
    assert found["settings"]["learning_rate"] == 0.03
    assert set(found["versions"]) >= {"torch", "transformers", "accelerate", "datasets"}


def test_the_printed_code_runs(finished):
    folder, printed = finished
    code = loading_code(str(folder), "AutoModelForSequenceClassification", 24)
    assert code in printed
    assert "accuracy 1.0000" in printed
    assert "tokens/s" in printed
    with redirect_stdout(io.StringIO()) as label:
        exec(code, {})
    assert label.getvalue().strip() in ("peace", "war")


def test_the_card_of_a_run_is_valid(finished):
    folder, _ = finished
    card = ModelCard.load(folder / "README.md")
    found = json.loads((folder / "metrics.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"accuracy": found["test"]["accuracy"], "f1": found["test"]["macro_f1"]}
    assert "trust_remote_code=True" in card.text
    assert f"--config {folder.parent / 'tiny.yaml'}" in card.text


def test_a_finished_run_is_evaluated_at_any_length(finished, capsys, tmp_path):
    folder, _ = finished
    found = json.loads((folder / "metrics.json").read_text())
    assert classify.evaluate_folder(folder, []) == pytest.approx(found["test"], rel=1e-6)
    # [CLS] we are at [SEP]: what tells the classes apart is cut off
    cut = classify.evaluate_folder(folder, ["--max_length=5", "--long_documents=truncate"])
    assert (cut["accuracy"], cut["n"]) == (pytest.approx(4 / 9, abs=0.12), 9)
    # a run that is older than the setting has cut its documents
    older = [line for line in (folder / "settings.yaml").read_text().splitlines() if "long_documents" not in line]
    copy = shutil.copytree(folder, tmp_path / "older")
    (copy / "settings.yaml").write_text("\n".join(older))
    assert classify.evaluate_folder(copy, ["--max_length=5"]) == cut
    settings = ClassifySettings.from_dict({**yaml.safe_load("\n".join(older)), "long_documents": "windows"})
    assert differences(copy, settings) == ["long_documents: 'truncate' → 'windows'"]


def test_a_finished_run_goes_on_as_a_checkpoint(finished, config):
    folder, _ = finished
    found = run(config, f"--model.checkpoint={folder}", "--max_steps=1", "--eval_steps=1", "--learning_rate=1e-9")
    assert found["history"][0]["accuracy"] == 1.0


# --- the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["accelerate.commands.launch", "--config_file", "configs/accelerate/one_cpu.yaml"], 1),
        # `accelerate launch --cpu --num_processes 2` starts one process only
        (["torch.distributed.run", "--nproc_per_node", "2"], 2),
    ],
    ids=["one process", "two processes"],
)
def test_launched_by_the_command_line(config, tmp_path, launcher, processes):
    command = [sys.executable, "-m", *launcher, "training/train.py", "--config", str(config)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/metrics.json").read_text())["training"]["processes"] == processes
    assert done.stdout.count("Test: accuracy 1.0000") == 1
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2
