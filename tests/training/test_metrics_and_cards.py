"""Metrics, the order of examples, model cards, and reports over several seeds."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import EvalResult, ModelCard

from efficient_transformers.cards import loading_code, model_card
from efficient_transformers.training.engine import metrics
from efficient_transformers.training.engine.batches import EpochSampler
from efficient_transformers.training.runs import report, running, train, train_all
from efficient_transformers.training.settings import InputError


def test_metrics_on_a_case_done_by_hand():
    # class 0: precision 2/3, recall 1; class 1: 1 and 1/3; class 2: 1/2 and 1 -> F1 0.8, 0.5, 2/3
    references, predictions = [0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 2, 2]
    scores = metrics.compute_metrics(metrics.load_metrics(), predictions, references)
    assert scores == pytest.approx({"accuracy": 4 / 6, "macro_f1": (0.8 + 0.5 + 2 / 3) / 3})


def test_a_metric_that_cannot_be_loaded_is_named(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(metrics.evaluate, "load", refuse)
    with pytest.raises(InputError, match=r"'mcc' of extra_metrics could not be loaded: no network"):
        metrics.load_metrics(["mcc"], trust_remote_code=True)


# --- order of the data


def test_the_order_follows_seed_and_epoch():
    lengths = [(7 * i) % 31 for i in range(50)]
    sampler = EpochSampler(50, seed=1, lengths=lengths, batch_size=5)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(EpochSampler(50, seed=2, lengths=lengths, batch_size=5)) not in (first, second)


def test_batches_are_of_similar_length():
    lengths = [(7 * i) % 31 for i in range(1000)]

    def padding(order):
        batches = [[lengths[i] for i in order[at : at + 5]] for at in range(0, 1000, 5)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(list(EpochSampler(1000, 0, lengths, 5))) < 0.3 * padding(list(EpochSampler(1000, 0)))


# --- several seeds


def test_lengths_are_compared_over_seeds(monkeypatch, config, tmp_path):
    def in_this_process(command):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(command[2:])
        return 0

    monkeypatch.setattr(running, "launch", in_this_process)

    def train_length(length, epochs):
        options = ["--variants", "local", "--seeds", "0", "1", "--max_length", str(length), f"--epochs={epochs}"]
        train_all.main(["--config", str(config), *options, "--out", str(tmp_path / f"runs/{length}")])

    train_length(24, 1)
    train_length(5, 1)
    page = tmp_path / "page.md"
    report.main([str(tmp_path / "runs"), "--out", str(page), "--beside", "max_length"])
    heads, _, row = ([cell.strip() for cell in line.split("|")[1:-1]]
                     for line in page.read_text().splitlines() if line.startswith("|"))  # fmt: skip
    assert heads[:4] == ["variant", "accuracy, 5 tokens", "accuracy, 24 tokens", "seeds"]
    folders = [tmp_path / f"runs/{length}/tiny-local" for length in (5, 24)]
    runs = [[folder, Path(f"{folder}-seed-1")] for folder in folders]
    tests = [[json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in both] for both in runs]
    assert row[1:4] == [*map(report.spread, tests), "0, 1"]

    with pytest.raises(SystemExit, match=r"holds a run with other settings \(epochs: 1 → 2\)"):
        train_length(24, 2)


def test_spread_is_the_sample_standard_deviation():
    assert report.spread([0.5, 0.6, 0.7]) == "0.600 ± 0.100"
    assert report.spread([0.5]) == "0.500"


# --- model cards


def test_a_card_carries_its_metadata():
    result = EvalResult("text-classification", "era", "Eras", "accuracy", 0.875, dataset_split="test")
    card = model_card(
        name="et-local",
        auto_class="AutoModelForSequenceClassification",
        description="Attention in a window.",
        results=[result],
        training={"steps": 10, "seed": 3},
        command="accelerate launch training/train.py",
        limits=["English only."],
        max_length=4096,
        license="apache-2.0",
        language="en",
        datasets=["somebody/data"],
        base_model="somebody/model",
        tags=["local"],
    )
    again = ModelCard(str(card)).data
    assert again.eval_results == [result]
    assert (again.model_name, again.license, again.language) == ("et-local", "apache-2.0", "en")
    assert (again.datasets, again.base_model, again.metrics) == (["somebody/data"], "somebody/model", ["accuracy"])
    assert "local" in again.tags
    for text in ("| Eras | test | accuracy | 0.875 |", "| seed | 3 |", "- English only.", "max_length=4096"):
        assert text in card.text


def test_a_card_needs_a_known_class():
    with pytest.raises(ValueError, match=r"auto_class \('AutoModelForFun'\) must be one of AutoModelForMaskedLM"):
        loading_code("folder", "AutoModelForFun")
