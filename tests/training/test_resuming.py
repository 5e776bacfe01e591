"""Which weights and checkpoints are kept, and runs that are killed or stopped and resumed."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from repository import ROOT
from safetensors.torch import load_file
from training_runs import assert_same_run, run

from efficient_transformers.training.engine import loop, task
from efficient_transformers.training.engine.checkpoints import PARTIAL, Checkpoints, Progress, files_of, seal
from efficient_transformers.training.engine.outputs import differences
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks.classify import ClassifySettings


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
