"""Settings, metrics, model cards, and training: its errors, its outputs, and runs that are killed and continued."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import training_runs
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import EvalResult, ModelCard
from repository import ROOT
from safetensors.torch import load_file
from training_runs import (
    TINY,
    assert_same_run,
    composed,
    each_variant_of,
    reset_accelerate,
    write_labelled,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from efficient_transformers.cards import loading_code, model_card
from efficient_transformers.training.engine import loop, metrics, task
from efficient_transformers.training.engine.batches import EpochSampler
from efficient_transformers.training.engine.building import build_config, build_model, load_tokenizer
from efficient_transformers.training.engine.checkpoints import PARTIAL, Checkpoints, Progress, files_of, seal
from efficient_transformers.training.engine.loop import make_optimizer
from efficient_transformers.training.engine.outputs import differences
from efficient_transformers.training.runs import bag_of_words, report, running, train, train_all
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import classify
from efficient_transformers.training.tasks.classify import ClassifySettings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus):
    """A YAML of tiny settings, its output folder beside it."""
    return write_config(tmp_path, corpus)


def write_config(folder, corpus, **values):
    return training_runs.write_config(folder, TINY, corpus, **values)


def run(config, *overrides):
    return classify.run(ClassifySettings.from_yaml(config, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a run that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with redirect_stdout(io.StringIO()) as printed:
        train.main(["--config", str(write_config(folder, corpus, tracker="tensorboard"))])
    reset_accelerate()
    return folder / "out", printed.getvalue()


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


# --- metrics


def test_metrics_on_a_case_done_by_hand():
    # class 0: precision 2/3, recall 1; class 1: 1 and 1/3; class 2: 1/2 and 1 -> F1 0.8, 0.5, 2/3
    references, predictions = [0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 2, 2]
    scores = metrics.compute_metrics(metrics.load_metrics(), predictions, references)
    assert scores == pytest.approx({"accuracy": 4 / 6, "macro_f1": (0.8 + 0.5 + 2 / 3) / 3})


def test_a_metric_that_cannot_be_loaded_is_named(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(metrics.evaluate, "load", refuse)
    with pytest.raises(InputError, match=r"'mcc' of extra_metrics could not be loaded: no network"):
        metrics.load_metrics(["mcc"], trust_remote_code=True)


# --- order of the data


def test_the_order_follows_seed_and_epoch():
    lengths = [(7 * i) % 31 for i in range(50)]
    sampler = EpochSampler(50, seed=1, lengths=lengths, batch_size=5)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(EpochSampler(50, seed=2, lengths=lengths, batch_size=5)) not in (first, second)


def test_batches_are_of_similar_length():
    lengths = [(7 * i) % 31 for i in range(1000)]

    def padding(order):
        batches = [[lengths[i] for i in order[at : at + 5]] for at in range(0, 1000, 5)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(EpochSampler(1000, 0, lengths, 5))) < 0.3 * padding(list(EpochSampler(1000, 0)))


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


# --- what is kept


def scripted(monkeypatch, accuracies):
    """Evaluations give these accuracies in turn; returns the weights that each of them saw."""
    seen, left = [], list(accuracies)

    def evaluate(self, model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss": 1.0, "accuracy": left.pop(0), "macro_f1": 0.0}

    monkeypatch.setattr(task.Evaluator, "__call__", evaluate)
    return seen


def test_the_best_weights_are_saved_and_patience_ends_training(monkeypatch, config, tmp_path):
    seen = scripted(monkeypatch, [0.5, 0.9, 0.9, 0.7, 0.1])  # the last one is the test split's
    found = run(config, "--eval_steps=1", "--patience=2")
    assert (found["training"]["steps"], found["validation"]["step"]) == (4, 2)
    saved = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert not torch.equal(seen[1]["classifier.weight"], seen[2]["classifier.weight"])


def test_a_lower_loss_is_better(monkeypatch, config):
    scripted(monkeypatch, [0.5] * 20)
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 2.0, 0.0])
    scores = task.Evaluator.__call__
    monkeypatch.setattr(task.Evaluator, "__call__", lambda *a: {**scores(*a), "loss": next(losses)})
    assert run(config, "--eval_steps=4", "--best_metric=loss")["validation"]["step"] == 8


def test_the_newest_checkpoints_are_kept_or_none(config, tmp_path):
    run(config, "--checkpoint_steps=2", "--keep_checkpoints=3")
    kept = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert kept == ["best.safetensors", "step-000000020", "step-000000022", "step-000000024"]
    AcceleratorState._reset_state(reset_partial_state=True)
    run(config, "--overwrite=true", "--keep_checkpoints_at_end=false")
    assert not (tmp_path / "out/checkpoints").exists()


def test_accumulated_batches_make_the_same_steps(config, tmp_path):
    found = run(config, "--gradient_accumulation=5", "--epochs=3", "--eval_steps=null")
    # 42 documents are 11 batches, which make 3 steps; evaluated after each epoch
    assert [entry["step"] for entry in found["history"]] == [3, 6, 9]


# --- stopped and continued


KILLED = {
    # in the second epoch, after a checkpoint in its middle
    "in a step": """
original, calls = loop.record_step, []
def record_step(*arguments):
    calls.append(1)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
loop.record_step = record_step
""",
    "while saving": """
original = pathlib.Path.rename
def rename(path, target):
    if path.name.startswith("step-000000006"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, target)
pathlib.Path.rename = rename
""",
}


@pytest.mark.parametrize("when", KILLED)
def test_a_killed_run_continues_as_if_nothing_had_happened(finished, config, tmp_path, when):
    code = f"""
import os, pathlib, signal
from efficient_transformers.training.engine import loop
from efficient_transformers.training.runs import train
{KILLED[when]}
train.main(["--config", {str(config)!r}])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "out/checkpoints").glob("step-*"))
    if when == "in a step":
        assert left == ["step-000000006", "step-000000009"]
    else:
        assert left == ["step-000000003", f"step-000000006{PARTIAL}"]
    assert not (tmp_path / "out/metrics.json").exists()

    run(config, "--resume=true")
    assert not list((tmp_path / "out/checkpoints").glob(f"*{PARTIAL}"))
    assert_same_run(tmp_path / "out", finished[0])


@pytest.mark.parametrize("step", [4, 6], ids=["in an epoch", "at the end of one"])
def test_sigterm_saves_and_says_how_to_go_on(monkeypatch, capsys, finished, config, tmp_path, step):
    original = loop.record_step

    def record_step(accelerator, progress, *rest):
        if progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(accelerator, progress, *rest)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "record_step", record_step)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(config), "--keep_checkpoints=3"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"--config {config} --keep_checkpoints=3 --resume" in capsys.readouterr().out
    assert (tmp_path / f"out/checkpoints/step-{step:09d}/progress.json").exists()

    monkeypatch.setattr(loop, "record_step", original)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["--config", str(config), "--resume"])
    assert f"Resuming after step {step} of 24" in capsys.readouterr().out
    assert_same_run(tmp_path / "out", finished[0])


def test_a_run_with_nothing_saved_yet_begins_anew(finished, config, tmp_path):
    run(config, "--resume=true")
    assert_same_run(tmp_path / "out", finished[0])


def test_a_finished_run_is_not_repeated(monkeypatch, finished):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("trained again"))
    folder, _ = finished
    assert run(folder.parent / "tiny.yaml", "--resume=true") == json.loads((folder / "metrics.json").read_text())


def test_a_run_is_not_continued_with_other_settings(finished):
    with pytest.raises(InputError, match=r"other settings \(learning_rate: 0.03 → 0.5; seed: 0 → 1\)"):
        run(finished[0].parent / "tiny.yaml", "--resume=true", "--seed=1", "--learning_rate=0.5")


def test_a_run_is_continued_by_code_with_a_new_setting(finished, tmp_path):
    then = yaml.safe_load((finished[0] / "settings.yaml").read_text())
    assert then.pop("eval_first") is False
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(then))
    config = finished[0].parent / "tiny.yaml"
    assert differences(tmp_path, ClassifySettings.from_yaml(config)) == []
    asked = ClassifySettings.from_yaml(config, ["--eval_first=true"])
    assert differences(tmp_path, asked) == ["eval_first: False → True"]


def test_a_run_is_not_continued_by_other_processes(tmp_path):
    class Two:
        num_processes, is_main_process = 2, True

        def wait_for_everyone(self): ...

    (tmp_path / "step-000000001").mkdir()
    (tmp_path / "step-000000001/progress.json").write_text(json.dumps(vars(Progress(step=1))))
    (tmp_path / "step-000000001/state.json").write_text("{}")
    seals = {name: seal(path) for name, path in files_of(tmp_path / "step-000000001")}
    (tmp_path / "step-000000001/files.json").write_text(json.dumps(seals))
    with pytest.raises(InputError, match="was saved by 1 processes and cannot be resumed by 2"):
        Checkpoints(tmp_path, 2, Two()).load(None)


# --- errors before any work


def test_an_output_folder_with_a_run_is_not_written_over(finished):
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=r"error: The output folder .* is not empty, it contains a run: --resume"):
        train.main(["--config", str(folder.parent / "tiny.yaml")])
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("override", ["--overwrite=true", "--resume=true", "--seed=0"])
def test_a_folder_of_something_else_is_left_alone(config, tmp_path, override):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and contains no run: set out to another"):
        run(config, override)
    assert (tmp_path / "out/thesis.tex").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The folder .*file/out cannot be written \(Not a directory\)"):
        run(config, f"--out={tmp_path / 'file/out'}")


def test_a_run_that_cannot_start_deletes_nothing_and_leaves_nothing(monkeypatch, finished, config, tmp_path):
    folder, _ = finished
    for overwritten in (folder, tmp_path / "out"):
        before = sorted(overwritten.rglob("*"))
        with pytest.raises(InputError, match=r"There is no file missing.jsonl"):
            run(config, "--overwrite=true", "--data=missing.jsonl", f"--out={overwritten}")
        assert sorted(overwritten.rglob("*")) == before


BAD_RUNS = {
    "length": (["--max_length=65"], r"max_length \(65\) must not exceed the model's max_position_embeddings \(64\)"),
    "field": (["--model.hiden_size=4"], "EtLocalConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
    "type": (["--model.model_type=brt"], "The model section cannot be used: .*brt"),
    "size": (["--model.hidden_size=wide"], "The model section cannot be used: .*hidden_size"),
    "vocabulary": (["--model.vocab_size=100"], r"vocab_size \(100\) must be at least the tokenizer's size \(4096\)"),
    "no tokenizer": (["--tokenizer=null"], "A new model needs a tokenizer"),
    "tokenizer": (["--tokenizer=missing/folder"], "The tokenizer 'missing/folder' cannot be loaded"),
    "checkpoint": (["--model.checkpoint=missing/folder"], "The checkpoint 'missing/folder' cannot be loaded"),
    "metric": (["--best_metric=acuracy"], r"best_metric \('acuracy'\) must be one of loss, accuracy, macro_f1"),
    "column": (["--label_column=kind"], "no column 'kind'; there are: label, text"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_refused_before_training(monkeypatch, config, tmp_path, overrides, message):
    monkeypatch.setattr(task, "train", lambda *arguments: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        run(config, *overrides)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_the_step(config, tmp_path):
    settings = ClassifySettings.from_yaml(config, ["--warmup_ratio=0", "--checkpoint_steps=1"])
    settings.learning_rate = 1e30  # out of its range
    with pytest.raises(InputError, match=r"The loss of step 2 is nan: training has diverged.*lower learning_rate"):
        classify.run(settings)
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000000001"]


# --- several seeds


def test_lengths_are_compared_over_seeds(monkeypatch, config, tmp_path):
    def in_this_process(command):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(command[2:])
        return 0

    monkeypatch.setattr(running, "launch", in_this_process)

    def train_length(length, epochs):
        options = ["--variants", "local", "--seeds", "0", "1", "--max_length", str(length), f"--epochs={epochs}"]
        train_all.main(["--config", str(config), *options, "--out", str(tmp_path / f"runs/{length}")])

    train_length(24, 1)
    train_length(5, 1)
    page = tmp_path / "page.md"
    report.main([str(tmp_path / "runs"), "--out", str(page), "--beside", "max_length"])
    heads, _, row = ([cell.strip() for cell in line.split("|")[1:-1]]
                     for line in page.read_text().splitlines() if line.startswith("|"))  # fmt: skip
    assert heads[:4] == ["variant", "accuracy, 5 tokens", "accuracy, 24 tokens", "seeds"]
    folders = [tmp_path / f"runs/{length}/tiny-local" for length in (5, 24)]
    runs = [[folder, Path(f"{folder}-seed-1")] for folder in folders]
    tests = [[json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in both] for both in runs]
    assert row[1:4] == [*map(report.spread, tests), "0, 1"]

    with pytest.raises(SystemExit, match=r"holds a run with other settings \(epochs: 1 → 2\)"):
        train_length(24, 2)


def test_spread_is_the_sample_standard_deviation():
    assert report.spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert report.spread([0.5]) == "0.500"


# --- model cards


def test_a_card_carries_its_metadata():
    result = EvalResult("text-classification", "era", "Eras", "accuracy", 0.875, dataset_split="test")
    card = model_card(
        name="et-local",
        auto_class="AutoModelForSequenceClassification",
        description="Attention in a window.",
        results=[result],
        training={"steps": 10, "seed": 3},
        command="accelerate launch training/train.py",
        limits=["English only."],
        max_length=4096,
        license="apache-2.0",
        language="en",
        datasets=["somebody/data"],
        base_model="somebody/model",
        tags=["local"],
    )
    again = ModelCard(str(card)).data
    assert again.eval_results == [result]
    assert (again.model_name, again.license, again.language) == ("et-local", "apache-2.0", "en")
    assert (again.datasets, again.base_model, again.metrics) == (["somebody/data"], "somebody/model", ["accuracy"])
    assert "local" in again.tags
    for text in ("| Eras | test | accuracy | 0.875 |", "| seed | 3 |", "- English only.", "max_length=4096"):
        assert text in card.text


def test_a_card_needs_a_known_class():
    with pytest.raises(ValueError, match=r"auto_class \('AutoModelForFun'\) must be one of AutoModelForMaskedLM"):
        loading_code("folder", "AutoModelForFun")


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
