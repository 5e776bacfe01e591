"""Runs on recall tasks: their output, evaluation at other lengths, interruption and refusals."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from generated_runs import RECALL, recall_run
from safetensors.torch import load_file
from training_runs import assert_same_run, read_metrics, reset_accelerate, stop_and_continue, write_config
from transformers import AutoModelForTokenClassification, AutoTokenizer

from efficient_transformers.training.data.packing import IGNORED
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.engine import outputs
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import recall
from efficient_transformers.training.tasks.recall import RecallSettings, load_task


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train.main(["--config", str(write_config(folder, RECALL, "mqar"))])
    reset_accelerate()
    return folder / "out"


def test_a_run_leaves_what_a_table_needs(finished):
    found = read_metrics(finished)
    assert 0 <= found["test"]["accuracy"] <= 1
    assert found["test"]["n"] == 12
    training = found["training"]
    assert training["tokens"] == 24 * 4 * 12
    assert training["tokens_per_second"] > 0
    assert 50 < training["peak_memory_mb"] < 100_000
    assert found["model"]["parameters"] == sum(x.numel() for x in load_file(finished / "model.safetensors").values())
    model = AutoModelForTokenClassification.from_pretrained(finished)
    assert model.config.id2label == {i: f"v{i}" for i in range(6)}
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model(**tokenizer("k1 v2 k2 v0 k2 _ k1", return_tensors="pt")).logits.shape == (1, 7, 6)


def test_the_memory_of_a_process_is_in_mebibytes():
    accelerator = Accelerator(cpu=True)
    before = outputs.peak_memory_mb(accelerator)
    held = np.ones((before + 100) * 2**17)  # of 8 bytes each: more than the process has ever held
    after = outputs.peak_memory_mb(accelerator)
    del held
    assert before + 100 <= after <= 2 * before + 101
    # what was given back still counts; the system's own count lags by some pages
    assert abs(outputs.peak_memory_mb(accelerator) - after) < 50


def test_the_memory_of_a_gpu_is_asked_for_where_there_is_one(monkeypatch):
    class OnGpu:
        device = torch.device("cuda", 1)

    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 5 * 2**20)
    assert outputs.peak_memory_mb(OnGpu()) == 5
    assert asked == [torch.device("cuda", 1)]


def test_recall_is_evaluated_at_any_length(finished, capsys):
    found = read_metrics(finished)
    again = recall.evaluate_folder(finished, [])
    assert again == pytest.approx(found["test"], rel=1e-6)
    reset_accelerate()
    assert recall.evaluate_folder(finished, ["--max_length=16"])["n"] == 12
    assert '"max_length": 16' in capsys.readouterr().out
    reset_accelerate()
    with pytest.raises(InputError, match=r"The task has 5 answers, but the model in .* has 6, or different ones"):
        recall.evaluate_folder(finished, ["--vocabulary=10"])


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(monkeypatch, finished, tmp_path):
    stop_and_continue(monkeypatch, write_config(tmp_path, RECALL, "mqar"), 10)
    assert_same_run(tmp_path / "out", finished)


def test_accuracy_is_that_of_the_asked_positions(finished):
    settings = RecallSettings.from_yaml(finished / "settings.yaml")
    model = AutoModelForTokenClassification.from_pretrained(finished).eval()
    data = load_task(settings).encode("test", 12, model)
    right = []
    for example in data:
        logits = model(torch.tensor(example["input_ids"]).long()[None]).logits[0].argmax(-1).numpy()
        right += (logits == example["labels"])[example["labels"] != IGNORED].tolist()
    assert len(right) == 12 * 2
    assert read_metrics(finished)["test"]["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("fields", [{"is_decoder": True}, {"model_type": "et_linformer", "projected_length": 4}])
def test_a_table_of_one_key_is_learnt(tmp_path, fields):
    """Copying one of four symbols over three tokens, by a causal model and by one that is none."""
    found = recall_run(
        tmp_path, data="copy", items=1, vocabulary=6, max_length=5, train_examples=400, max_steps=150, eval_steps=50,
        model={**RECALL["model"], **fields, "hidden_dropout_prob": 0.0},
    )  # fmt: skip
    assert found["test"]["accuracy"] > 0.9


def test_a_needle_run_keeps_the_documents_of_the_splits_apart(bundled_tokenizer):
    settings = RecallSettings.from_dict({**RECALL, "data": "needle", "tokenizer": "data/tokenizer"})
    texts = load_texts(RecallSettings(data="era"))
    source = load_task(settings)
    for name in ("validation", "test"):
        examples = source.encode(name, 150, None)
        whole = " ".join(texts[name])
        other = " ".join(texts["train"])
        for example in list(examples)[:3]:
            parts = bundled_tokenizer.decode(example["input_ids"]).split(" The secret word of ")
            longest = max((parts[0], *(part.partition(".")[2] for part in parts[1:])), key=len)
            assert len(longest) > 50
            assert longest in whole
            assert longest not in other


BAD_RECALL = {
    "task": ({"data": "mqra"}, "data ('mqra') must be one of mqar, copy, induction, needle; did you mean 'mqar'?"),
    "items": ({"items": 0}, "items (0) must be at least 1."),
    "vocabulary": ({"vocabulary": 3}, "vocabulary (3) must be at least 4."),
    "tokenizer": ({"tokenizer": "x"}, "tokenizer ('x') has no effect: mqar generates its own words."),
    "metric": ({"best_metric": "f1"}, "best_metric ('f1') must be loss or accuracy."),
    "examples": ({"test_examples": 0}, "test_examples (0) must be at least 1."),
    "short": ({"min_length": 3}, "min_length (3) is too short for an item of mqar: increase it."),
    "short needles": (
        {"data": "needle", "min_length": 8},
        "min_length (8) has no effect: needle uses documents. Omit it.",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD_RECALL.values(), ids=BAD_RECALL)
def test_bad_recall_settings_are_refused(values, message):
    with pytest.raises(InputError) as error:
        RecallSettings.from_dict({"data": "mqar", "model": {"model_type": "bert"}, **values})
    assert message in str(error.value)
