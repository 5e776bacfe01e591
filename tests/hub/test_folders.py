"""What leaves a folder, and folders that are damaged: `export`, `push` and the commands that open one."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from zoo import build

from efficient_transformers import VARIANTS
from efficient_transformers.cli import main
from efficient_transformers.exporting import export, select_files
from efficient_transformers.folders import check_folder
from efficient_transformers.publishing import missing_for_push

CARD = "---\nlicense: apache-2.0\nmodel_name: et-local\n---\n# et-local\n"


@pytest.fixture
def folder(tmp_path):
    """A saved model with a card, settings and metrics."""
    root = tmp_path / "saved"
    build(VARIANTS["local"], {}, dtype=torch.float32).save_pretrained(root)
    (root / "README.md").write_text(CARD)
    (root / "settings.yaml").write_text("data: era\n")
    (root / "metrics.json").write_text("{}")
    return root


STRAY = ("secrets.env", "id_rsa", "notes.txt", "customers.csv", ".env", "sub/secret.json", "tool.py", "train.log")


def test_only_what_belongs_to_a_model_leaves_a_folder(folder, tmp_path, capsys):
    for name in STRAY:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    export(folder, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {"config.json", "model.safetensors", "README.md", "settings.yaml", "metrics.json"} <= written
    assert not written & {*STRAY, "sub"}
    assert main(["push", str(folder), "me/et-local", "--dry-run"]) == 2  # the card has no results
    said = capsys.readouterr()
    assert "the model card has no results" in said.err
    sent, _, rest = said.out.partition("bytes in")
    assert "modeling_local.py" in sent
    for name in STRAY:
        assert name not in sent
        assert f"{name} (not a part of a model)" in rest


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    (folder / "vocab.txt").symlink_to(secret)
    (folder / "LICENSE").symlink_to(folder / "README.md")
    (folder / "onnx").symlink_to(tmp_path)
    selection = select_files(folder)
    assert selection.left_out["vocab.txt"] == selection.left_out["onnx"] == "a link out of the folder"
    assert "LICENSE" in {file.path for file in selection.files}
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is a link out of the folder"):
        export(folder, tmp_path / "out")


def test_no_path_of_this_machine_is_written(folder, tmp_path):
    data = tmp_path / "a folder with a long name" / "My data" / "customers.csv"  # YAML folds such lines
    (folder / "settings.yaml").write_text(yaml.safe_dump({"data": str(data), "model": {"checkpoint": "/home/me/bert"}}))
    command = "accelerate launch training/train.py --data /home/me/files/x.csv --out runs/a/b"
    (folder / "metrics.json").write_text(json.dumps({"command": command, "settings": {"data": str(data)}}))
    links = "see https://arxiv.org/abs/2004.05150 and docs/a/b.md; n/2/d."
    (folder / "README.md").write_text(f"{CARD}Trained on {data} from `/home/me/bert`, {links}\n")
    export(folder, tmp_path / "out")
    settings = yaml.safe_load((tmp_path / "out/settings.yaml").read_text())
    assert settings == {"data": "customers.csv", "model": {"checkpoint": "bert"}}
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["command"] == command.replace("/home/me/files/", "")
    assert metrics["settings"]["data"] == "customers.csv"
    text = ModelCard.load(tmp_path / "out/README.md").text
    assert f"Trained on customers.csv from `bert`, {links}" in text
    assert str(tmp_path) not in "".join(
        p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"
    )
    assert str(data) in (folder / "README.md").read_text()  # the run itself keeps its paths


def test_files_without_local_paths_are_copied_byte_for_byte(folder, tmp_path):
    export(folder, tmp_path / "out")
    for name in ("settings.yaml", "metrics.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def broken(path):
    path.write_text('{"a": ')


def a_list(path):
    path.write_text("[1]")


DAMAGE = [
    ("model.safetensors", cut, "not a complete safetensors file"),
    ("model.safetensors", empty, "not a complete safetensors file"),
    ("config.json", broken, "cannot be read as JSON"),
    ("config.json", a_list, "must hold a JSON object, not a list"),
    ("metrics.json", broken, "cannot be read as JSON"),
    ("settings.yaml", broken, "cannot be read as YAML"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_files_are_named_by_every_command(folder, tmp_path, capsys, name, damage, message):
    damage(folder / name)
    with pytest.raises(ValueError, match=message):
        check_folder(folder)
    out = str(tmp_path / "out")
    for command in (
        ["export", str(folder), out],
        ["push", str(folder), "me/x", "--dry-run"],
        ["convert", str(folder), "--to", "linear", "--out", out],
        ["plot", "pattern", str(folder), "--out", out],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert message in said, command
        assert name in said, command
        assert len(said.splitlines()) == 1, command


def test_an_index_that_names_absent_tensors_is_refused(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists a in model-00001-of-00002.safetensors, which does not have it"):
        check_folder(folder)


def test_a_broken_card_is_named(folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert any("README.md cannot be read" in clause for clause in missing_for_push(folder))


BAD = [
    (["describe", "local", "widnow_size=3"], "EtLocalConfig has no field 'widnow_size'; did you mean 'window_size'"),
    (["describe", "local", "banana=3"], "EtLocalConfig has no field 'banana'"),
    (["describe", "local", "hidden_size=abc"], "'hidden_size' expected int"),
    (["describe", "local", "hidden_size=-4"], "hidden_size (-4) must be at least 1"),
    (["describe", "local", "num_attention_heads=0"], "num_attention_heads (0) must be at least 1"),
    (["describe", "local", "window_size=[1]"], "window_size has 1 entries"),
    (["describe", "local", "hidden_size"], "must have the form field=value"),
    (["describe", "local", "--length", "99999999999"], "--length (99,999,999,999) must lie between 1 and 1,048,576"),
    (["plot", "pattern", "local", "widow_size=3"], "did you mean 'window_size'"),
    (["plot", "pattern", "local", "--length", "10000000"], "length (10,000,000) must lie between 1 and 2,048"),
    (["plot", "pattern", "local", "--length", "0"], "length (0) must lie between 1 and 2,048"),
    (["plot", "pattern", "local", "--heads", "0"], "--heads (0) must be at least 1"),
    (["convert", "nowhere", "--to", "local", "--out", "x"], "source ('nowhere') is no folder"),
    (["export", "nowhere", "x"], "There is no folder nowhere"),
    (["push", "nowhere", "a/b"], "There is no folder nowhere"),
]


@pytest.mark.parametrize(
    ("command", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_commands_end_with_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        main(["--debug", "export", str(tmp_path / "nowhere"), str(tmp_path / "x")])


def test_a_copy_of_a_hub_snapshot_can_be_exported(folder, tmp_path):
    """The cache of the Hub holds links to blobs outside of the snapshot; `cp -L` makes files of them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="link out of the folder"):
        export(snapshot, tmp_path / "out")
    shutil.copytree(snapshot, tmp_path / "copy")
    assert export(tmp_path / "copy", tmp_path / "out")
