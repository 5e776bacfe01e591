"""Training documents that are read as they are needed: every one once an epoch, in an order that can be taken up."""

from functools import partial
from itertools import islice

import datasets
import pytest
from training_runs import (
    MODEL,
    assert_same_run,
    kill_and_continue,
    reset_accelerate,
    write_config,
    write_rows,
    write_sentences,
)

from efficient_transformers.training.data import texts
from efficient_transformers.training.data.texts import stream_texts
from efficient_transformers.training.engine.streaming import Stream
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_clm, pretrain_mlm
from efficient_transformers.training.tasks.pretrain_clm import ClmSettings
from efficient_transformers.training.tasks.pretrain_mlm import MlmSettings

TINY = {
    "tokenizer": "data/tokenizer",
    "model": {**MODEL, "hidden_dropout_prob": 0.1},
    "max_length": 24,
    "streaming": True,
    "stream_buffer": 7,
    "max_steps": 24,
    "batch_size": 4,
    "learning_rate": 0.01,
    "eval_steps": 6,
    "checkpoint_steps": 5,
    "keep_checkpoints_at_end": True,
    "tracker": "none",
}
SCRIPTS = {
    "masked": (pretrain_mlm, MlmSettings, "best_fit"),
    "causal": (pretrain_clm, ClmSettings, "documents"),
}


@pytest.fixture
def corpus(tmp_path):
    """A folder of three files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_sentences(folder).rename(folder / "train.jsonl")
    for split in ("validation", "test"):
        write_rows(folder / f"{split}.jsonl", [{"text": "the people of the union are at war ."}] * 3)
    return folder


def settings_of(corpus, **values):
    return MlmSettings.from_dict({**TINY, "data": str(corpus), **values})


@pytest.mark.parametrize(("script", "settings_class", "packing"), SCRIPTS.values(), ids=SCRIPTS)
def test_a_streamed_run_goes_on_where_it_was_killed(monkeypatch, corpus, tmp_path, script, settings_class, packing):
    def run(config, *overrides):
        return script.run(settings_class.from_yaml(config, [f"--packing={packing}", *overrides]))

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(texts, "_read_hub", lambda *arguments: pytest.fail("read whole"))
    found = run(write_config(tmp_path / "whole", TINY, corpus))
    assert found["training"]["steps"] == 24
    assert found["training"]["epochs"] >= 1  # the stream has begun again
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    reset_accelerate()
    config = write_config(tmp_path / "killed", TINY, corpus)
    left = kill_and_continue(monkeypatch, partial(run, config), tmp_path / "killed/out", 18, 24)
    assert left == "step-000000015"
    assert_same_run(tmp_path / "killed/out", tmp_path / "whole/out")


class Words:
    """Windows that are the words of their texts."""

    def __init__(self, texts):
        self.words = [word for text in texts for word in text.split()]

    def __len__(self):
        return len(self.words)


def test_every_example_is_seen_once_an_epoch_in_another_order():
    documents = [f"{i}a {i}b" for i in range(20)]
    stream = Stream(lambda: documents, Words, buffer=6, seed=3)
    epochs = [[windows.words[index] for _, windows, index in stream.examples(epoch)] for epoch in (0, 1)]
    expected = sorted(word for document in documents for word in document.split())
    assert [sorted(words) for words in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]
    assert [windows.words[index] for _, windows, index in stream.examples(0)] == epochs[0]
    assert [number for number, *_ in stream.examples(0)] != list(range(40))
    assert sorted(number for number, *_ in stream.examples(0)) == list(range(40))


def test_no_more_is_read_than_is_needed():
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield f"{i}"

    assert len(list(islice(Stream(documents, Words, buffer=5, seed=0).examples(0), 7))) == 7
    assert len(read) == 10


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_files_are_streamed(corpus, tmp_path, suffix):
    lines = [f"document {i}" for i in range(5)]
    table = datasets.Dataset.from_dict({"text": lines})
    path = str(tmp_path / f"texts{suffix}")
    {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv}[suffix](path)
    held = {"validation_data": str(corpus / "validation.jsonl"), "test_data": str(corpus / "test.jsonl")}
    read, others = stream_texts(settings_of(path, **held))
    assert list(read()) == list(read()) == lines
    assert {name: len(split) for name, split in others.items()} == {"validation": 3, "test": 3}


def test_a_hub_data_set_is_streamed(monkeypatch, corpus):
    def load_dataset(name, config, streaming):
        assert streaming
        split = datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
        return {"train": split, "validation": split}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read, others = stream_texts(settings_of("a/b", test_data=str(corpus / "test.jsonl")))
    assert list(read()) == ["a", "b"]
    assert (others["validation"], len(others["test"])) == (["a", "b"], 3)
    with pytest.raises(InputError, match=r"There is no test data, and streaming cannot cut it .* set test_data"):
        stream_texts(settings_of("a/b"))


def test_a_stream_of_nothing_is_refused(corpus, tmp_path):
    (corpus / "train.jsonl").write_text("")
    with pytest.raises(InputError, match="The training data contains no examples"):
        pretrain_mlm.run(MlmSettings.from_yaml(write_config(tmp_path, TINY, corpus)))


BAD = {
    "endless": ({"max_steps": None}, "streaming does not know how long an epoch is: set max_steps"),
    "buffer": ({"stream_buffer": 0}, r"stream_buffer \(0\) must be at least 1"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(corpus, values, message):
    with pytest.raises(InputError, match=message):
        settings_of(corpus, **values)
