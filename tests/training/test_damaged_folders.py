"""Damaged files of a finished run: every script names the file in one line and ends with exit code 2."""

import json
import os
import shutil

import pytest
from training_runs import TINY, reset_accelerate, write_config, write_labelled

from efficient_transformers.training.runs import evaluate, publish, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, TINY | {"license": "mit"}, write_labelled(folder), epochs=1, checkpoint_steps=3)
    train.main(["--config", str(config)])
    reset_accelerate()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "run")
    return tmp_path / "run"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def write(text):
    return lambda path: path.write_bytes(text)


def without(name):
    return lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name})
    )


EMPTY, OTHER, BINARY = write(b""), write(b"[1]"), write(bytes(range(256)))
DAMAGE = {
    "truncated weights": ("model.safetensors", truncate, "is not a complete safetensors file"),
    "empty weights": ("model.safetensors", EMPTY, "is not a complete safetensors file"),
    "truncated config": ("config.json", truncate, "cannot be read as JSON"),
    "a list as config": ("config.json", OTHER, "must hold a JSON object"),
    "truncated tokenizer": ("tokenizer.json", truncate, "cannot be read as JSON"),
    "another tokenizer": ("tokenizer.json", OTHER, "does not hold a tokenizer"),
    "no tokenizer": ("tokenizer.json", write(b'{"version": "1.0"}'), "does not hold a tokenizer"),
    "truncated tokenizer config": ("tokenizer_config.json", truncate, "cannot be read as JSON"),
    "truncated metrics": ("metrics.json", truncate, "cannot be read as JSON"),
    "binary metrics": ("metrics.json", BINARY, "cannot be read as JSON"),
    "no YAML": ("settings.yaml", write(b"data: [era"), "cannot be read as YAML"),
    "binary settings": ("settings.yaml", BINARY, "cannot be read as YAML"),
}
COMMANDS = {
    "evaluate": lambda run, config: evaluate.main([str(run)]),
    "publish": lambda run, config: publish.main([str(run), f"{run}-published"]),
    "write cards": lambda run, config: publish.main(["--cards", str(run)]),
    "fine-tune": lambda run, config: train.main(
        ["--config", str(config), "--out", f"{run}-new", f"--model.checkpoint={run}", f"--tokenizer={run}"]
    ),
}


def refusal(command, run, config, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command](run, config)
    assert ended.value.code == 2
    said = str(ended.value)
    assert "\n" not in said
    assert f"{said}\n" in capsys.readouterr().err
    return said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(finished, run, capsys, command, name, damage, message):
    damage(run / name)
    said = refusal(command, run, finished / "tiny.yaml", capsys)
    assert said.startswith("error: ")
    assert str(run / name) in said
    assert message in said
    assert not (run.parent / "run-new").exists()
    assert not (run.parent / "run-published").exists()


@pytest.mark.parametrize("section", ["settings", "model", "training", "validation", "test", "versions"])
def test_metrics_of_something_else_are_refused(finished, run, capsys, section):
    without(section)(run / "metrics.json")
    said = refusal("publish", run, finished / "tiny.yaml", capsys)
    assert f"{run / 'metrics.json'} has no {section}: it is not that of a finished run" in said


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"id2label": 3}),
        ("config.json", {"vocab_size": "many"}),
        ("tokenizer_config.json", {"added_tokens_decoder": 3}),
    ],
)
def test_values_of_another_type_end_in_one_line(finished, run, capsys, name, values):
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | values))
    refusal("evaluate", run, finished / "tiny.yaml", capsys)


def test_broken_settings_cannot_be_resumed(finished, run, capsys):
    (run / "metrics.json").unlink()
    truncate(run / "settings.yaml")
    with (run / "settings.yaml").open("a") as file:
        file.write("\n: [")
    with pytest.raises(SystemExit, match=r"settings\.yaml cannot be read as YAML") as ended:
        train.main(["--config", str(finished / "tiny.yaml"), "--out", str(run), "--resume"])
    assert ended.value.code == 2


def test_a_finished_run_with_broken_metrics_is_not_taken_for_finished(finished, run):
    truncate(run / "metrics.json")
    with pytest.raises(SystemExit, match=r"metrics\.json cannot be read as JSON"):
        train.main(["--config", str(finished / "tiny.yaml"), "--out", str(run), "--resume"])
