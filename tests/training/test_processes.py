"""One run in several processes: the same losses as in one, weights divided among them, and accelerate's configs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from accelerate.utils.launch import prepare_multi_gpu_env
from repository import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate
from training_runs import MODEL, write_config, write_labelled, write_sentences
from transformers import AutoModelForCausalLM

from efficient_transformers.training.data.masking import Masker, RemaskedWindows
from efficient_transformers.training.data.packing import Window
from efficient_transformers.training.engine.batches import Batch, EpochSampler, Steps, shares
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_clm
from efficient_transformers.training.tasks.pretrain_clm import ClmSettings

LAUNCHERS = ROOT / "configs/accelerate"


TINY = {
    "task": "pretrain_clm",
    "tokenizer": "data/tokenizer",
    "model": {**MODEL, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0},
    "max_length": 24,
    "epochs": 3,
    "batch_size": 4,
    "global_batch_size": 8,
    "learning_rate": 0.01,
    "warmup_ratio": 0.1,
    "eval_steps": 4,
    "log_steps": 1,
}


def launched(config, *options, launcher="several_cpu", processes=2):
    """Losses of the steps of a run by `accelerate launch`, and its metrics."""
    out = f"{config.parent}/{launcher}-{processes}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{LAUNCHERS / launcher}.yaml"]
    if launcher != "one_cpu":
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["training/train.py", "--config", str(config), f"--out={out}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (events,) = Path(out).glob("runs/**/events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    return [event.value for event in log.Scalars("train/loss")], json.loads(Path(out, "metrics.json").read_text())


@pytest.fixture
def documents(tmp_path):
    return write_sentences(tmp_path)


@pytest.fixture
def labelled(tmp_path):
    return write_labelled(tmp_path, 59)  # 41 for training: one alone in the last step of an epoch


TASKS = {"classify": "labelled", "pretrain_clm": "documents"}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_take_the_steps_of_one(task, request, tmp_path):
    """Windows are of unequal length, and the last step of an epoch need not have an example for each process."""
    config = write_config(tmp_path, TINY, request.getfixturevalue(TASKS[task]), task=task)
    packing = ["--packing=padding"] if task == "pretrain_clm" else []
    one, alone = launched(config, *packing, launcher="one_cpu", processes=1)
    two, together = launched(config, *packing, "--batch_size=3")  # 2 batches of 2 in each process
    assert together["training"]["processes"] == 2
    assert len(one) == len(two) == alone["training"]["steps"] > 12
    assert two == pytest.approx(one, abs=1e-4)
    assert together["training"]["tokens"] == alone["training"]["tokens"]
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        # a perplexity of hundreds is off by as much more
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


MODELS = {
    "tied": {},
    "reversible": {"reversible": True},
    "random features": {"model_type": "et_performer", "num_random_features": 8, "feature_redraw_interval": 3},
}
WITH_DEEPSPEED = pytest.param(
    "deepspeed_zero3", marks=pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
)
SHORT = ("--max_steps=8", "--checkpoint_steps=3", "--keep_checkpoints_at_end=true")


@pytest.mark.slow
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_divided_weights_are_trained_saved_and_continued(fields, documents, tmp_path):
    model = {**TINY["model"], **fields}
    if "model_type" in fields:
        del model["window_size"]
    config = write_config(tmp_path, TINY, documents, model=model)
    # features are drawn again after so many passes, so both have one batch a step
    one, alone = launched(config, *SHORT, "--batch_size=8", launcher="one_cpu", processes=1)
    two, found = launched(config, *SHORT, launcher="fsdp2")
    assert two == pytest.approx(one, abs=1e-4)
    folder = tmp_path / "fsdp2-2"
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "one_cpu-1"))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    AutoModelForCausalLM.from_pretrained(folder)
    assert found["test"]["loss"] == pytest.approx(alone["test"]["loss"], abs=1e-4)
    assert pretrain_clm.evaluate_folder(folder, [])["loss"] == pytest.approx(found["test"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["several_cpu", "fsdp2", WITH_DEEPSPEED])
def test_several_processes_go_on_as_if_nothing_had_happened(launcher, documents, tmp_path):
    model = {**TINY["model"], "hidden_dropout_prob": 0.2}
    config = write_config(tmp_path, TINY, documents, model=model)
    short = (*SHORT, "--mixed_precision=no")
    losses, found = launched(config, *short, launcher=launcher)
    folder = tmp_path / f"{launcher}-2"
    weights = load_file(folder / "model.safetensors")
    # as a kill between the steps 6 and 8 leaves it
    shutil.rmtree(folder / "checkpoints/step-000000008")
    shutil.rmtree(folder / "runs")
    (folder / "metrics.json").unlink()
    (folder / "model.safetensors").unlink()
    rest, again = launched(config, *short, "--resume=true", launcher=launcher)
    assert rest == losses[6:]
    assert again["history"] == found["history"]
    continued = load_file(folder / "model.safetensors")
    assert all(torch.equal(continued[name], weights[name]) for name in weights)


# --- the shares of the processes


@pytest.mark.parametrize(
    ("examples", "processes", "batch_size"), [(8, 2, 4), (8, 2, 3), (7, 3, 2), (1, 4, 2), (5, 1, 2)]
)
def test_the_examples_of_a_step_are_shared_out(examples, processes, batch_size):
    found = shares(range(examples), processes, batch_size)
    assert len(found) == processes
    assert len({len(batches) for batches in found}) == 1  # all take part in each backward pass
    assert sorted(index for batches in found for batch in batches for index in batch) == list(range(examples))
    assert max(len(batch) for batches in found for batch in batches) <= batch_size
    sizes = [len(batch) for batches in found for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def steps_of(processes, process, size=6):
    data = [{"labels": torch.tensor(index)} for index in range(20)]
    order = EpochSampler(len(data), seed=3, lengths=[index % 7 for index in range(20)], batch_size=size)
    return Steps(data, default_collate, order, size, 2, torch.device("cpu"), processes, process)


def indices_of(batches):
    return sorted(index for batch in batches for index in batch.indices)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_sees_the_same_steps(processes):
    alone = [indices_of(step) for step in steps_of(1, 0).of_epoch(1)]
    assert len(alone) == steps_of(1, 0).per_epoch == 4
    parts = [list(steps_of(processes, process).of_epoch(1)) for process in range(processes)]
    together = [indices_of(chain(*step)) for step in zip(*parts, strict=True)]
    assert together == alone
    for batch in (batch for part in parts for step in part for batch in step):
        read = batch.inputs["labels"].tolist()
        assert read == batch.indices or (batch.indices == [] and len(read) == 1)


def test_an_epoch_is_taken_up_where_it_was_left():
    whole = [[batch.indices for batch in step] for step in steps_of(2, 1).of_epoch(2)]
    assert [[batch.indices for batch in step] for step in steps_of(2, 1).of_epoch(2, done=3)] == whole[3:]


def test_workers_change_no_batch_and_outlive_sigterm():
    """Masks of two epochs, the second taken up in its middle."""
    windows = [Window(np.arange(5, 9 + index % 7), np.arange(4 + index % 7)) for index in range(20)]
    data = RemaskedWindows(windows, Masker(1, np.arange(5, 90), 0.5), seed=3)

    def batches(workers, epoch, done):
        steps = Steps(data, lambda rows: rows, EpochSampler(20, 3), 6, 2, torch.device("cpu"), workers=workers)
        for step in steps.of_epoch(epoch, done):
            for process in active_children():
                process.terminate()
            yield from ((row["input_ids"].tolist(), row["labels"].tolist()) for batch in step for row in batch.inputs)

    for epoch, done in ((0, 0), (1, 1)):
        alone = list(batches(0, epoch, done))
        assert list(batches(2, epoch, done)) == alone
        assert len(alone) == 20 - 6 * done


def test_labels_are_counted_as_the_loss_counts_them():
    masked = {"labels": torch.tensor([[-100, 5, 6], [-100, -100, 7]]), "input_ids": torch.ones(2, 3)}
    assert Batch([4, 9], masked).labels() == 3
    assert Batch([], masked).labels() == Batch([], masked).tokens() == 0
    assert Batch([4, 9], masked).tokens() == 6
    assert Batch([4, 9], masked | {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}).tokens() == 3
    assert Batch([4, 9], {"labels": torch.tensor([[0.5, -100.0], [1.0, 2.0]])}).labels() == 2
    assert Batch([4, 9], {"start_positions": torch.tensor([3, 1])}).labels() == 2


# --- settings


def test_the_size_of_a_step_is_given_in_one_way(documents, tmp_path):
    values = {**TINY, "data": str(documents)}
    assert [ClmSettings.from_dict(values).step_size(n) for n in (1, 3)] == [8, 8]
    del values["global_batch_size"]
    assert [ClmSettings.from_dict(values | {"gradient_accumulation": 5}).step_size(n) for n in (1, 3)] == [20, 60]
    with pytest.raises(InputError, match=r"dataloader_num_workers \(1\) has no effect with streaming"):
        ClmSettings.from_dict(values | {"dataloader_num_workers": 1, "streaming": True, "max_steps": 1})
    with pytest.raises(InputError, match=r"gradient_accumulation \(2\) follows from global_batch_size \(8\)"):
        ClmSettings.from_dict(values | {"gradient_accumulation": 2, "global_batch_size": 8})


def test_there_are_configs_of_accelerate_to_test():
    names = {path.stem for path in LAUNCHERS.glob("*.yaml")}
    assert names == {"one_cpu", "several_cpu", "several_gpu", "fsdp2", "deepspeed_zero3"}


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_configs(path):
    """`accelerate launch` up to the start of the processes: an unknown key, or a wrong value, is refused."""
    config = load_config_from_file(str(path))
    arguments = ["--config_file", str(path), "script.py"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    processes = yaml.safe_load(path.read_text())["num_processes"]
    assert parsed.num_processes == config.num_processes == processes
    kinds = {"multi_gpu": parsed.multi_gpu, "fsdp": parsed.use_fsdp, "deepspeed": parsed.use_deepspeed}
    wanted = {"several_cpu": "multi_gpu", "several_gpu": "multi_gpu", "fsdp2": "fsdp", "deepspeed_zero3": "deepspeed"}
    assert {kind for kind, used in kinds.items() if used} == {wanted.get(path.stem)} - {None}
    if path.stem == "deepspeed_zero3":
        known = {field.name for field in dataclasses.fields(DeepSpeedPlugin)}
        assert set(yaml.safe_load(path.read_text())["deepspeed_config"]) <= known
    if path.stem == "fsdp2":
        environment = prepare_multi_gpu_env(parsed)
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
