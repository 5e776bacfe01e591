"""Training state in files that cannot execute code: safetensors for tensors, JSON for the rest, no pickle.

A checkpoint may come from elsewhere, and unpickling a crafted file runs its code. accelerate unpickles the schedule,
torch.distributed.checkpoint its metadata, and DeepSpeed everything. None of them loads a checkpoint here, except
DeepSpeed, under `weights_only`.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import is_divided

STATE = "state.json"
DEEPSPEED = "deepspeed"  # folder that DeepSpeed writes
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # makes every torch.load refuse anything but tensors


@dataclass
class TrainingState:
    """Mutable state of a run: prepared model and optimizer, schedule, fp16 scaler and random states."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    schedule: Any

    def save(self, folder: Path) -> None:
        """Write all files below `folder`. Collective: call it on every rank.

        Weights and moments are written by each process if they are sharded, otherwise by the main process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        accelerator = self.accelerator
        values: dict[str, Any] = {"schedule": self.schedule.state_dict()}
        if accelerator.scaler is not None:
            values["scaler"] = accelerator.scaler.state_dict()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model.save_checkpoint(str(folder), DEEPSPEED)  # type: ignore[operator]
        elif is_divided(accelerator) or accelerator.is_main_process:
            save_file(_local(self._weights()), folder / self._file("model"))
            found = self.optimizer.state_dict()
            moments = {
                f"{index}.{name}": value for index, state in found["state"].items() for name, value in state.items()
            }
            save_file(_local(moments), folder / self._file("optimizer"))
            values["groups"] = found["param_groups"]
        save_random_states(folder / f"random-{accelerator.process_index}.safetensors", accelerator.device)
        if accelerator.is_main_process:
            (folder / STATE).write_text(json.dumps(values), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Restore the saved state. Collective. Raises an error of any type if the files do not match this run."""
        accelerator = self.accelerator
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            with weights_only():
                self.model.load_checkpoint(str(folder), DEEPSPEED)  # type: ignore[operator]
        else:
            self._load_weights(load_file(folder / self._file("model")))
            self._load_moments(load_file(folder / self._file("optimizer")), values["groups"])
        self.schedule.load_state_dict(values["schedule"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(values["scaler"])
        load_random_states(folder / f"random-{accelerator.process_index}.safetensors", accelerator.device)

    def _file(self, stem: str) -> str:
        part = f"-{self.accelerator.process_index}" if is_divided(self.accelerator) else ""
        return f"{stem}{part}.safetensors"

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and saved buffers, sharing memory with the model; tied ones once."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        once = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
        return {name: value for name, value in model.state_dict().items() if name in once}

    def _load_weights(self, saved: Mapping[str, Tensor]) -> None:
        own = self._weights()
        if own.keys() != saved.keys():
            raise ValueError(f"its weights are not those of the model ({_first(own.keys() ^ saved.keys())})")
        for name, value in own.items():
            target = value.to_local() if isinstance(value, DTensor) else value
            if target.shape != saved[name].shape:
                raise ValueError(f"{name} has the shape {tuple(saved[name].shape)}, not {tuple(target.shape)}")
            target.copy_(saved[name])

    def _load_moments(self, saved: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.items():
            index, name = key.split(".")
            parameter = parameters[int(index)]
            if isinstance(parameter, DTensor) and value.ndim:  # not the number of steps
                value = DTensor.from_local(
                    value,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{key} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            state.setdefault(int(index), {})[name] = value
        for group in groups:
            group["betas"] = tuple(group["betas"])  # JSON has lists
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _local(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each tensor, or this process's part of it, in memory of its own on the CPU."""
    parts = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in parts.items()}


def _first(names: Any) -> str:
    return ", ".join(sorted(names)[:3])


@contextmanager
def weights_only() -> Iterator[None]:
    """Context in which torch.load accepts only tensors and plain values, even if a library requests more."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


# --- random states


def save_random_states(path: Path, device: torch.device) -> None:
    """Save the random states of Python, numpy, torch and the device."""
    version, words, gauss = random.getstate()
    name, key, place, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from it
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(key, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        tensors["device"] = torch.get_device_module(device).get_rng_state()
    numbers = {"python": [version, gauss], "numpy": [name, place, has_gauss, cached]}
    save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})


def load_random_states(path: Path, device: torch.device) -> None:
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, place, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors["device"])
