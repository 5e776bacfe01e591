"""Output folders: one run at a time, and the same files from the same inputs."""

import json
import os
import platform
import shutil
import signal

import pytest
from training_runs import TINY, reset_accelerate, write_config, write_labelled

from efficient_transformers.training.engine.lock import LOCK, hold
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError

SHORT = {"epochs": 1, "eval_steps": 100, "checkpoint_steps": 100}


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, TINY, write_labelled(tmp_path), **SHORT)


@pytest.fixture
def other_process(tmp_path):
    """The id of a process that holds the output folder until it is killed."""
    ready, write = os.pipe()
    if not (process := os.fork()):
        with hold(tmp_path / "out"):
            os.write(write, b"held")
            signal.pause()
    assert os.read(ready, 4) == b"held"
    yield process
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("option", ["--log_steps=10", "--resume", "--overwrite"])
def test_a_folder_that_another_run_writes_to_is_refused(config, tmp_path, other_process, option):
    with pytest.raises(SystemExit) as refused:
        train.main(["--config", str(config), option])
    assert refused.value.code == 2
    assert f"process {other_process} on {platform.node()}" in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_a_process_that_dies_leaves_the_folder_free(config, tmp_path, other_process):
    os.kill(other_process, signal.SIGKILL)
    os.waitid(os.P_PID, other_process, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "out" / LOCK).exists()
    train.main(["--config", str(config)])
    assert (tmp_path / "out/metrics.json").exists()
    assert not (tmp_path / "out" / LOCK).exists()


def test_the_lock_outlives_what_overwrite_deletes(config, tmp_path, monkeypatch):
    train.main(["--config", str(config)])
    reset_accelerate()
    (tmp_path / "out/stale").write_text("")
    seen = []
    monkeypatch.setattr("efficient_transformers.training.engine.task.train", lambda *given: seen.append(held(tmp_path)))
    with pytest.raises(TypeError):
        train.main(["--config", str(config), "--overwrite"])
    assert seen == [True]
    assert not (tmp_path / "out/stale").exists()
    assert not held(tmp_path)


def held(tmp_path):
    try:
        with hold(tmp_path / "out"):
            return False
    except InputError:
        return True


# --- the same files from the same inputs


def contents(folder):
    """What each file holds, without times and the name of the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "metrics.json":
            metrics = json.loads(content)
            for name in ("seconds", "tokens_per_second", "peak_memory_mb"):
                del metrics["training"][name]
            content = json.dumps(metrics)
        elif path.name == "README.md":
            content = b"".join(line for line in content.splitlines(True) if not line.startswith(b"| time "))
        elif path.name == "progress.json":
            content = json.dumps(json.loads(content) | {"seconds": 0})
        elif path.name == "files.json":
            content = json.dumps({name: seal for name, seal in json.loads(content).items() if name != "progress.json"})
        found[path.relative_to(folder).as_posix()] = content
    return found


@pytest.mark.parametrize("task", ["classify", "pretrain_mlm"])
def test_files_do_not_depend_on_the_token_cache(tmp_path, monkeypatch, task):
    monkeypatch.setenv("EFFICIENT_TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    config = write_config(tmp_path, TINY, write_labelled(tmp_path), **SHORT, task=task)
    runs = []
    for cached in (False, True):
        assert any((tmp_path / "cache").glob("*.arrow")) is cached
        train.main(["--config", str(config)])
        reset_accelerate()
        runs.append(contents(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    cold, warm = runs
    assert cold.keys() == warm.keys()
    assert [name for name in cold if cold[name] != warm[name]] == []
    assert {"tokenizer.json", "model.safetensors", "settings.yaml"} <= cold.keys()
