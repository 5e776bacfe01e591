"""Folders from elsewhere: no command runs code that they bring along, unless the user says so on the command line."""

import contextlib
import json
import shutil
from pathlib import Path

import finetune_with_trainer
import pytest
import torch
import transformers
import yaml
from repository import ROOT
from training_runs import TINY, reset_accelerate, write_config, write_labelled
from transformers import BertConfig, BertModel

from efficient_transformers import cli
from efficient_transformers.conversion import convert
from efficient_transformers.training.engine.checkpoints import MANIFEST, files_of, seal
from efficient_transformers.training.engine.outputs import finished_settings
from efficient_transformers.training.runs import evaluate, publish, train
from efficient_transformers.training.tasks.lra import LraSettings

# written by code that must not run: on import, and so by whatever loads the file
CODE = """
from pathlib import Path

import datasets
import evaluate
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

Path({marker!r}).write_text("has run")


class Config(BertConfig):
    model_type = "foreign"


class Model(BertForSequenceClassification):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int64")))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"count": float(len(predictions))}}
"""
MODELS = ("AutoModel", "AutoModelForSequenceClassification")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and the data and config it was made of."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, TINY | {"license": "mit"}, write_labelled(folder), epochs=1, checkpoint_steps=2)
    train.main(["--config", str(config)])
    reset_accelerate()
    return folder / "out"


@pytest.fixture
def marker(tmp_path):
    """Exists once foreign code has run."""
    return tmp_path / "marker"


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def grant_trust(folder, **values):
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | values | {"trust_remote_code": True}))


def with_foreign_code(finished, tmp_path, marker, kind):
    """A copy of the run whose model, tokenizer or metric has code of its own, and whose settings trust it."""
    folder = tmp_path / kind
    shutil.copytree(finished, folder)
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    grant_trust(folder, **({"extra_metrics": [str(folder / "foreign.py")]} if kind == "metric" else {}))
    if kind == "model":
        classes = {"AutoConfig": "foreign.Config", **dict.fromkeys(MODELS, "foreign.Model")}
        edit_json(folder / "config.json", model_type="foreign", architectures=["Model"], auto_map=classes)
    if kind == "tokenizer":
        name_tokenizer(folder)
    return folder


def name_tokenizer(folder, reference="foreign.Tokenizer"):
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [None, reference]}
    )


# command → its arguments, from the folder and a free path
COMMANDS = {
    "evaluate": lambda folder, out: evaluate.main([str(folder)]),
    "train again": lambda folder, out: train.main(["--config", f"{folder}/settings.yaml", "--out", str(out)]),
    "fine-tune": lambda folder, out: train.main(
        ["--config", f"{folder}/settings.yaml", "--out", str(out), "--model", "{}", f"--model.checkpoint={folder}",
         f"--tokenizer={folder}"]
    ),
    "publish": lambda folder, out: publish.main([str(folder), str(out)]),
    "write cards": lambda folder, out: publish.main(["--cards", str(folder)]),
    "check": lambda folder, out: publish.main(["--check", str(folder)]),
    "attention": lambda folder, out: cli.main(["attention", str(folder), "--length", "16"]),
    "plot": lambda folder, out: cli.main(["plot", "pattern", str(folder), "--out", str(out)]),
    "convert": lambda folder, out: cli.main(["convert", str(folder), "--to", "local", "--out", str(out)]),
    "example": lambda folder, out: finetune_with_trainer.main(
        ["--checkpoint", str(folder), "--data", str(ROOT / "data/sotu"), "--label_column", "era", "--output_dir",
         str(out), "--use_cpu"]
    ),
}  # fmt: skip
REFUSED = [
    ("evaluate", "model"), ("evaluate", "tokenizer"), ("evaluate", "metric"),
    ("train again", "metric"), ("fine-tune", "model"), ("fine-tune", "tokenizer"),
    ("publish", "model"), ("publish", "tokenizer"), ("publish", "metric"),
    ("write cards", "model"), ("write cards", "tokenizer"),
    ("check", "model"), ("check", "tokenizer"),
    ("attention", "model"), ("plot", "model"), ("plot", "tokenizer"), ("example", "model"), ("example", "tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "kind"), REFUSED)
def test_foreign_code_is_named_and_not_run(finished, tmp_path, marker, capsys, monkeypatch, command, kind):
    folder = with_foreign_code(finished, tmp_path, marker, kind)
    monkeypatch.setattr("builtins.input", lambda question: "y")  # transformers would ask, and take that for trust
    try:
        code = COMMANDS[command](folder, tmp_path / "out")
        said = capsys.readouterr().err
    except SystemExit as ended:
        code, said = ended.code, capsys.readouterr().err
    except ValueError as error:  # of the example, a script without an error path of its own
        code, said = 2, str(error)
    assert not marker.exists()
    assert code == 2
    assert "foreign.py" in said
    if kind != "metric":
        assert f"(class {kind.capitalize() if kind == 'tokenizer' else 'Config'}, named by " in said
    assert "--trust_remote_code" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["convert"])
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_foreign_code_that_is_not_needed_does_not_run(finished, tmp_path, marker, command, kind):
    """Of a type that transformers has: its own classes open the folder."""
    folder = with_foreign_code(finished, tmp_path, marker, kind)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    size = len(transformers.AutoTokenizer.from_pretrained(ROOT / "data/tokenizer"))
    model = BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **small))
    model.save_pretrained(folder)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"})
    with contextlib.suppress(ValueError):
        convert(folder, "local")
    COMMANDS[command](folder, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["model", "tokenizer", "metric"])
def test_copying_a_folder_runs_nothing(finished, tmp_path, marker, kind):
    folder = with_foreign_code(finished, tmp_path, marker, kind)
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert cli.main(["push", str(folder), "me/model", "--dry-run"]) in (0, 2)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["model", "tokenizer", "metric"])
def test_the_user_can_allow_it(finished, tmp_path, marker, kind):
    """The marker is written: the tests above would see code that runs."""
    folder = with_foreign_code(finished, tmp_path, marker, kind)
    with contextlib.suppress(SystemExit):  # the weights do not fit the foreign model
        evaluate.main([str(folder), "--trust_remote_code"])
    assert marker.exists()


def test_a_reference_to_another_repository_is_foreign(finished, tmp_path, marker, capsys):
    folder = with_foreign_code(finished, tmp_path, marker, "tokenizer")
    name_tokenizer(folder, "someone/else--foreign.Tokenizer")
    for command in ("evaluate", "check"):
        with pytest.raises(SystemExit, match=r"foreign\.py of someone/else"):
            COMMANDS[command](folder, tmp_path / "out")
        reset_accelerate()


def test_a_folder_does_not_say_where_files_are_written(finished, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(finished, folder)
    grant_trust(folder, task="lra", data="listops", tokenizer=None, cache=str(tmp_path / "elsewhere"))
    settings = finished_settings(LraSettings, folder, [])
    assert settings.cache is None
    assert not settings.trust_remote_code
    assert finished_settings(LraSettings, folder, ["--cache", "here"]).cache == "here"


# --- checkpoints


class Crafted:
    """Unpickled, it writes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "has run")


def write_crafted(path, marker):
    torch.save({"step": 0, "random_state": Crafted(marker)}, path)


def seal_again(checkpoint):
    """Match the checksums to the crafted files, as their author would."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    (checkpoint / MANIFEST).write_text(json.dumps({name: seal(path) for name, path in files_of(checkpoint)}))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that has two checkpoints and is not finished, beside its config."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = write_config(folder, TINY, write_labelled(folder), epochs=1, checkpoint_steps=2)
    train.main(["--config", str(config)])
    reset_accelerate()
    (folder / "out/metrics.json").unlink()
    return folder


@pytest.fixture
def resumed(interrupted, tmp_path):
    """A copy of the interrupted run, and a function that resumes it."""
    shutil.copytree(interrupted / "out", tmp_path / "out")
    config = str(interrupted / "tiny.yaml")
    return tmp_path / "out", lambda: train.main(["--config", config, "--out", str(tmp_path / "out"), "--resume"])


def checkpoints_of(folder):
    found = sorted((folder / "checkpoints").glob("step-*"))
    assert len(found) == 2
    return found


def test_a_checkpoint_holds_no_pickle(resumed):
    folder, resume = resumed
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    resume()


PICKLES = ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt",
           "pytorch_model.bin", "sampler.bin", "dl_state_dict.bin")  # fmt: skip


@pytest.mark.parametrize("names", [PICKLES, PICKLES[:1]], ids=["all", "schedule"])
@pytest.mark.parametrize("older", [False, True], ids=["beside our files", "as of an older version"])
def test_a_crafted_pickle_in_a_checkpoint_is_not_opened(resumed, marker, older, names):
    folder, resume = resumed
    for checkpoint in checkpoints_of(folder):
        for path in checkpoint.iterdir():
            if older and path.name not in ("progress.json", "model.safetensors"):
                path.unlink()
        for name in names:
            write_crafted(checkpoint / name, marker)
        seal_again(checkpoint)
    if older:
        with pytest.raises(SystemExit, match=r"it has no state.json: an older version saved it, as pickles"):
            resume()
    else:
        resume()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"])
def test_a_pickle_under_another_name_is_not_opened(resumed, marker, name):
    folder, resume = resumed
    for checkpoint in checkpoints_of(folder):
        write_crafted(checkpoint / name, marker)
        seal_again(checkpoint)
    with pytest.raises(SystemExit, match=r"The checkpoint .* is not one of this run") as ended:
        resume()
    assert ended.value.code == 2
    assert not marker.exists()


def test_a_checkpoint_names_no_files_elsewhere(resumed):
    folder, resume = resumed
    for checkpoint in checkpoints_of(folder):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "/dev/zero": [0, 0]}))
    with pytest.raises(SystemExit, match="names /dev/zero, which is not in its folder"):
        resume()


@pytest.mark.parametrize("command", ["evaluate", "publish", "fine-tune", "plot", "example"])
def test_pickled_weights_execute_nothing(finished, tmp_path, marker, command):
    folder = tmp_path / "folder"
    shutil.copytree(finished, folder)
    (folder / "model.safetensors").unlink()
    write_crafted(folder / "pytorch_model.bin", marker)
    with contextlib.suppress(SystemExit, Exception):  # each reports it in its own way
        COMMANDS[command](folder, tmp_path / "out")
    assert not marker.exists()


def test_a_crafted_pickle_runs_where_it_is_opened(tmp_path, marker):
    """The tests above would notice."""
    write_crafted(tmp_path / "file", marker)
    torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()
