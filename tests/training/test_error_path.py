"""One line for wrong input in every script, and the traceback with --debug."""

import subprocess
import sys

import pytest
from repository import ROOT
from training_runs import TINY, write_config

from efficient_transformers.training.runs import bag_of_words, evaluate, publish, report, train, train_all
from efficient_transformers.training.settings import InputError

SCRIPTS = {
    "train": (train, ["--config", "gone.yaml"]),
    "train_all": (train_all, ["--config", "gone.yaml"]),
    "bag_of_words": (bag_of_words, ["--config", "gone.yaml"]),
    "evaluate": (evaluate, ["gone"]),
    "publish": (publish, ["gone", "out"]),
    "report": (report, ["gone"]),
}


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_say_what_is_wrong_in_one_line(capsys, script, arguments):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "gone" in said
    with pytest.raises((InputError, ValueError, OSError)) as error:
        script.main([*arguments, "--debug"])
    assert "gone" in str(error.value)


def test_a_mistyped_model_type_has_a_short_message(tmp_path, capsys):
    config = write_config(tmp_path, TINY, "era", label_column="era")
    with pytest.raises(SystemExit):
        train.main(["--config", str(config), "--model.model_type=et_locl"])
    said = capsys.readouterr().err
    assert "there is no model_type 'et_locl'; did you mean 'et_local'?" in said
    assert len(said) < 300


@pytest.mark.slow
def test_accelerate_adds_no_traceback_of_its_own(tmp_path):
    config = write_config(tmp_path, TINY, "gone.jsonl")
    command = ["-m", "accelerate.commands.launch", "--quiet", str(ROOT / "training/train.py"), "--config", str(config)]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "error: There is no file gone.jsonl" in ended.stderr
    assert "Traceback" not in ended.stderr
