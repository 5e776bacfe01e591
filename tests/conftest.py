"""Environment, fixtures and scheduling of all tests."""

import os
import re
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # the Hub cannot be reached from a test, and each failing call would take seconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# also for the processes that tests start: at these sizes, two threads spend more time waiting than computing
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a cache of tokenized texts for this session alone
os.environ["EFFICIENT_TRANSFORMERS_CACHE"] = tempfile.mkdtemp()

import pytest
import torch

from efficient_transformers.models import attn_pattern, attn_pattern_tiled, base_mixer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset accelerate's global state after each test that trains."""
    yield
    if "training_runs" in sys.modules:
        sys.modules["training_runs"].reset_accelerate()


@pytest.fixture
def never_short(monkeypatch):
    """Run short test sequences through the engine of long ones."""
    for module in (attn_pattern_tiled, attn_pattern):
        monkeypatch.setattr(module, "is_short", lambda pattern, *sizes: pattern.is_full)


@pytest.fixture
def same_choices(monkeypatch):
    """Keep the data-dependent choices of mixers from the first pass: in another precision they may differ."""
    choices = {}

    def decide(self, layer, choose):
        if layer not in choices:
            with torch.no_grad():
                choices[layer] = choose()
        return self.decisions.setdefault(layer, choices[layer])

    monkeypatch.setattr(base_mixer.SequenceInfo, "cached_choice", decide)


def pytest_make_parametrize_id(val, argname: str) -> str | None:
    """Name values that pytest would print without their parameter, or only number: `causal`, `length=7`."""
    if isinstance(val, bool):
        return argname if val else f"not {argname}"
    if val is None or isinstance(val, (int, float)):
        return f"{argname}={val}"
    if isinstance(val, (dict, list, tuple)) and plain(val):
        pairs = [f"{name}={value}" for name, value in val.items()] if isinstance(val, dict) else map(str, val)
        return re.sub(r"['\"]", "", f"{argname}({', '.join(pairs)})")[:80]
    return None


def plain(value) -> bool:
    """True if the text of `value` is the same in every process."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str))


@pytest.hookimpl(tryfirst=True)  # before pytest deselects slow tests
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Keep files with expensive fixtures in one process each, and mark all but the sampled cases of tables as slow."""
    for item in items:
        if item.path.parent.name in ("training", "hub"):  # tests of a file share a finished training run, or a Hub
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
    tables: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tables.setdefault((str(item.path), item.originalname), []).append(item)  # type: ignore[attr-defined]
    for cases in tables.values():
        (count,) = cases[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        fast = {round(place * len(cases) / count) for place in range(count)}
        for number, item in enumerate(cases):
            if number not in fast:
                item.add_marker(pytest.mark.slow)
