import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # the Hub cannot be reached from a test; every failing call would cost seconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# processes that tests start, too: two threads wait for each other longer than models of this size compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what one session of tests has tokenised is nothing to the next, or to the user
os.environ["EFFICIENT_TRANSFORMERS_CACHE"] = tempfile.mkdtemp()

import pytest
import torch

from efficient_transformers.models import base_mixer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """No test of training finds the accelerator of the one before it."""
    yield
    if "training_runs" in sys.modules:
        sys.modules["training_runs"].reset_accelerate()


@pytest.fixture
def same_choices(monkeypatch):
    """What mixers choose by the data in a first pass holds for the whole test: in another precision they may differ."""
    choices = {}

    def decide(self, layer, choose):
        if layer not in choices:
            with torch.no_grad():
                choices[layer] = choose()
        return self.decisions.setdefault(layer, choices[layer])

    monkeypatch.setattr(base_mixer.SequenceInfo, "cached_choice", decide)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Run each file of training/ and hub/ in one process: its tests share a finished training run, or a Hub."""
    for item in items:
        if item.path.parent.name in ("training", "hub"):
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
