"""What goes wrong in a run: kills at any moment, full disks, spoilt checkpoints, losses that are not finite."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from training_runs import (
    TINY,
    PowerCut,
    assert_same_run,
    bpe,
    kill_and_continue,
    reset_accelerate,
    run,
    write_config,
    write_rows,
)

from efficient_transformers import EtLocalForSequenceClassification
from efficient_transformers.training.data.documents import encode_documents, load_documents
from efficient_transformers.training.engine import loop, task
from efficient_transformers.training.engine.batches import EpochSampler
from efficient_transformers.training.engine.checkpoints import Checkpoints, fault_of
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks.classify import ClassifySettings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished")
    run(write_config(folder, TINY, corpus))
    reset_accelerate()
    return folder / "out"


@pytest.fixture(scope="module")
def left(tmp_path_factory, corpus):
    """What a run leaves that was killed in step 11: checkpoints of the steps 6 and 9."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        original = loop.record_step

        def cut(accelerator, progress, *rest):
            if progress.step == 10:
                raise PowerCut
            return original(accelerator, progress, *rest)

        patch.setattr(loop, "record_step", cut)
        with pytest.raises(PowerCut):
            run(write_config(folder, TINY, corpus))
    reset_accelerate()
    return folder / "out"


# --- spoilt checkpoints


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT = {
    "truncated": ("optimizer.safetensors", truncate, r"optimizer.safetensors has [\d,]+ bytes of [\d,]+"),
    "one bit": ("model.safetensors", flip, "model.safetensors has changed"),
    "missing": ("random-0.safetensors", Path.unlink, "random-0.safetensors: No such file"),
    "not JSON": ("files.json", truncate, "files.json or progress.json: "),
    "other JSON": ("files.json", lambda path: path.write_text("[1]"), "files.json or progress.json: "),
    "no list": ("files.json", Path.unlink, "files.json: No such file"),
}


@pytest.mark.parametrize(("name", "spoil", "fault"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_checkpoint_is_known(left, tmp_path, name, spoil, fault):
    folder = tmp_path / "checkpoint"
    shutil.copytree(left / "checkpoints/step-000000009", folder)
    assert fault_of(folder) is None
    spoil(folder / name)
    with pytest.raises(AssertionError, match=fault):
        assert fault_of(folder) is None, fault_of(folder)


def test_the_checkpoint_before_a_spoilt_one_is_taken(capsys, finished, left, config, tmp_path):
    shutil.copytree(left, tmp_path / "out")
    truncate(tmp_path / "out/checkpoints/step-000000009/model.safetensors")
    run(config, "--resume=true")
    printed = capsys.readouterr().out
    assert "step-000000009 cannot be read (model.safetensors has " in printed
    assert "trying the previous one" in printed
    assert "Resuming after step 6 of 24" in printed
    assert_same_run(tmp_path / "out", finished)


def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(left, config, tmp_path):
    shutil.copytree(left, tmp_path / "out")
    for checkpoint in (tmp_path / "out/checkpoints").glob("step-*"):
        truncate(checkpoint / "progress.json")
    with pytest.raises(
        SystemExit, match=r"error: None of the checkpoints in .* \(step-000000009: .*; step-000000006: "
    ):
        train.main(["--config", str(config), "--resume"])
    assert len(list((tmp_path / "out/checkpoints").glob("step-*"))) == 2


def test_best_weights_that_are_spoilt_are_told_of(monkeypatch, config, tmp_path):
    original = loop.record_step

    def record_step(accelerator, progress, *rest):
        if progress.step == 5:
            truncate(tmp_path / "out/checkpoints/best.safetensors")
        return original(accelerator, progress, *rest)

    monkeypatch.setattr(loop, "record_step", record_step)
    with pytest.raises(InputError, match=r"The best weights .*best.safetensors cannot be read"):
        run(config, "--eval_steps=5", "--max_steps=6", "--best_metric=loss", "--learning_rate=1e-12")


# --- full disks


@contextlib.contextmanager
def largest_file(size):
    """The limit of the operating system: who writes more to a file gets EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [200_000, 400_000], ids=["weights", "moments"])
def test_a_checkpoint_that_cannot_be_written_is_told_of(monkeypatch, finished, config, tmp_path, size):
    save = Checkpoints.save

    def limited(self, progress, state):
        with largest_file(size) if progress.step == 9 else contextlib.nullcontext():
            save(self, progress, state)

    monkeypatch.setattr(Checkpoints, "save", limited)
    with pytest.raises(SystemExit) as error:
        train.main(["--config", str(config)])
    said = str(error.value)
    assert said.startswith(f"error: The checkpoint of step 9 could not be written to {tmp_path / 'out/checkpoints'}: ")
    assert " MB are free there. Earlier files are kept: free some space, and continue with --resume." in said
    assert "\n" not in said
    there = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert there == ["best.safetensors", "step-000000003", "step-000000006"]

    monkeypatch.undo()
    reset_accelerate()
    run(config, "--resume=true")
    assert_same_run(tmp_path / "out", finished)


def test_a_model_that_cannot_be_written_is_told_of(monkeypatch, finished, config, tmp_path):
    with monkeypatch.context() as patch:
        original = task.finish_folder

        def finish(*arguments):
            with largest_file(200_000):
                original(*arguments)

        patch.setattr(task, "finish_folder", finish)
        with pytest.raises(InputError, match=r"The trained model could not be written .*continue with --resume"):
            run(config)
    assert not (tmp_path / "out/metrics.json").exists()
    reset_accelerate()
    run(config, "--resume=true")
    assert_same_run(tmp_path / "out", finished)


def can_mount(folder):
    return (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode
    )


def test_a_disk_that_fills_up_ends_the_run_and_room_continues_it(finished, config, tmp_path):
    """A file system of 1 MB, of which a checkpoint takes 0.8."""
    (tmp_path / "out").mkdir()
    if not can_mount(tmp_path / "out"):
        pytest.skip("only root may mount a file system; the tests above do with a limit")
    try:
        with pytest.raises(InputError, match=r"could not be written .*No space left on device.* [\d.]+ MB are free"):
            run(config)
        subprocess.run(["mount", "-o", "remount,size=32m", tmp_path / "out"], check=True)
        reset_accelerate()
        run(config, "--resume=true")
        assert_same_run(tmp_path / "out", finished)
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)


# --- losses that are not finite


@pytest.fixture
def poisoned(monkeypatch, tmp_path, corpus):
    """A function that spoils the loss of the batches with a certain example, of which the config and the index."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows[7]["text"] = "tariff " + rows[7]["text"]
    config = write_config(tmp_path, TINY, write_rows(tmp_path / "poisoned.jsonl", rows))
    texts, _ = load_documents(ClassifySettings.from_yaml(config)).splits["train"]
    (index,) = (index for index, text in enumerate(texts) if text.startswith("tariff"))
    tokenizer = bpe()
    token = (set(tokenizer("tariff")["input_ids"]) - set(tokenizer("we are at war peace")["input_ids"])).pop()
    original = EtLocalForSequenceClassification.forward

    def spoiling(spoil):
        def forward(self, input_ids=None, **inputs):
            out = original(self, input_ids=input_ids, **inputs)
            if out.loss is not None and (input_ids == token).any():
                out.loss = spoil(out.loss, self)
            return out

        monkeypatch.setattr(EtLocalForSequenceClassification, "forward", forward)
        return config, index

    return spoiling


def examples_in(message):
    (listed,) = re.findall(r"training examples ([\d, ]+) \(counted from 0\)", message)
    return [int(index) for index in listed.split(", ")]


def test_a_loss_that_is_not_a_number_names_step_and_batch(poisoned, tmp_path):
    config, index = poisoned(lambda loss, model: loss * float("nan"))
    with pytest.raises(InputError, match=r"The loss of step \d is nan: training has diverged") as error:
        run(config, "--checkpoint_steps=1")
    examples = examples_in(str(error.value))
    assert index in examples
    assert len(examples) == 4  # one batch of the step's two
    step = int(re.findall(r"step (\d)", str(error.value))[0])
    order = list(EpochSampler(42, 0, train_lengths(config), 8))[8 * (step - 1) : 8 * step]
    assert set(examples) < set(order)
    assert index in order
    kept = {path.name for path in (tmp_path / "out/checkpoints").glob("step-*")}
    assert kept == {f"step-{n:09d}" for n in range(max(1, step - 2), step)}


def train_lengths(config):
    settings = ClassifySettings.from_yaml(config)
    data = encode_documents(load_documents(settings), "train", bpe(), 24, settings)
    return data.lengths


def test_a_gradient_that_is_not_finite_is_told_before_it_is_saved(poisoned, tmp_path):
    # the slope of the root is infinite at 0, and the loss as it was
    config, index = poisoned(lambda loss, model: loss + (model.classifier.weight * 0).sum().sqrt())
    with pytest.raises(InputError, match=r"The gradient of step \d is not finite, although its loss is \d") as error:
        run(config, "--checkpoint_steps=1")
    assert index in examples_in(str(error.value))
    for checkpoint in (tmp_path / "out/checkpoints").glob("step-*"):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


# --- states that models change themselves


STATEFUL = {
    "performer": {"model_type": "et_performer", "num_random_features": 8, "feature_redraw_interval": 7},
    "routing": {"model_type": "et_routing", "num_clusters": 2, "attention_probs_dropout_prob": 0.1},
    "sinkhorn": {"model_type": "et_sinkhorn", "block_size": 4},  # draws noise in training
    "reformer": {"model_type": "et_reformer", "lsh_chunk_length": 4, "num_hashes": 1, "num_buckets": 4},
}


@pytest.mark.parametrize("fields", STATEFUL.values(), ids=STATEFUL)
def test_what_a_model_draws_and_counts_goes_on(monkeypatch, corpus, tmp_path, fields):
    model = {key: value for key, value in TINY["model"].items() if key != "window_size"} | fields
    runs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, TINY, corpus, model=model, epochs=2)
        runs.append((config, tmp_path / name / "out"))
    run(runs[0][0])
    reset_accelerate()
    # the checkpoint is of step 6, whose 12 passes are no multiple of 7
    left = kill_and_continue(monkeypatch, partial(run, runs[1][0]), runs[1][1], 8, 12)
    assert left == "step-000000006"
    assert_same_run(runs[1][1], runs[0][1], "step-000000012")
    start, end = (load_file(runs[1][1] / f"checkpoints/step-{step:09d}/model.safetensors") for step in (9, 12))
    changed = {name.rpartition(".")[2] for name in start if not torch.equal(start[name], end[name])}
    expected = {"performer": {"passes", "projection"}, "routing": {"centroids", "sums", "savings"}}
    assert expected.get(fields["model_type"].removeprefix("et_"), set()) <= changed


# --- kills at any moment


KILLER = """
import os, random, re, signal, sys, time
import torch
torch.set_num_threads(1)
from efficient_transformers.training.runs import train  # once for all the runs

def saved():
    there = os.listdir({checkpoints!r}) if os.path.isdir({checkpoints!r}) else []
    return there, max((int(name[5:]) for name in there if re.fullmatch("step-[0-9]+", name)), default=0)


draw, kills, finished = random.Random(0), 0, False
while not finished:
    # by steps and not by seconds, of which a fast machine needs too few; or somewhere on the way to the first of them
    steps = draw.randrange(15)
    more, until = saved()[1] + steps, None
    child = os.fork()
    if not child:
        try:
            train.main(["--config", {config!r}, "--resume"])
        finally:
            sys.stdout.flush()
            os._exit(0)
    while not finished and (kills == 20 or until is None or time.monotonic() < until):
        finished = os.waitpid(child, os.WNOHANG)[0] != 0
        if until is None and saved()[1] >= more:
            until = time.monotonic() + draw.uniform(0, 0.05 if steps else 1.5)
        time.sleep(0.001)
    if not finished:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        print("killed", *sorted(saved()[0]), flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_one_never_stopped(corpus, tmp_path):
    values = {"epochs": 50, "checkpoint_steps": 1, "eval_steps": 10, "tracker": "tensorboard"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(write_config(tmp_path / "whole", TINY, corpus, **values))
    config, checkpoints = write_config(tmp_path / "killed", TINY, corpus, **values), tmp_path / "killed/out/checkpoints"
    code = KILLER.format(config=str(config), checkpoints=str(checkpoints))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(kills) == 20
    newest = [max((name for name in names if re.fullmatch(r"step-\d+", name)), default="") for names in kills]
    assert newest == sorted(newest)  # what has been saved is never lost
    assert len(set(newest)) > 5  # and the kills were spread over the run
    assert "cannot be read" not in done.stdout
    assert_same_run(tmp_path / "killed/out", tmp_path / "whole/out", "step-000000300")
