"""What the tests of training runs share: a fresh start for each, and what makes two runs the same."""

import json

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file


def reset_accelerate():
    """The next run in this process begins as it would in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same_run(folder, other, last="step-000000024"):
    """Final and last weights, moments and history are equal, bit for bit."""
    for name in ("model.safetensors", f"checkpoints/{last}/model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (torch.load(path / f"checkpoints/{last}/optimizer.bin") for path in (folder, other))
    for index, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][key]) for key, value in state.items())
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, other))
    for name in ("history", "test", "validation"):
        assert ours[name] == theirs[name]
    assert ours.get("before") == theirs.get("before")
    assert ours["training"]["tokens"] == theirs["training"]["tokens"]
