"""Texts are cut once: the cache gives what was made, and nothing else than what was asked for."""

import re

import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from training_runs import TEXT, bpe, wordpiece

from efficient_transformers.training.data import documents, packing
from efficient_transformers.training.data.documents import Documents, encode_documents
from efficient_transformers.training.data.token_cache import cache_file
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import pretrain_clm, pretrain_mlm
from efficient_transformers.training.tasks.classify import ClassifySettings
from efficient_transformers.training.tasks.pretrain_clm import ClmSettings, load_open_tokenizer
from efficient_transformers.training.tasks.pretrain_mlm import MlmSettings

TEXTS = [TEXT * 3, "but 1234 nobody", TEXT]
VALUES = {"data": "era", "tokenizer": "data/tokenizer", "model": {"model_type": "bert"}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFICIENT_TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def refuse(monkeypatch):
    """A function after whose call nothing may be tokenised any more."""

    def refusing():
        def refuse(*arguments, **options):
            pytest.fail("tokenised again")

        for module, name in ((packing, "encoded"), (documents, "cut_windows")):
            monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr("efficient_transformers.training.data.causal.encoded", refuse)

    return refusing


def masked(tokenizer, texts=TEXTS, length=16, **values):
    return pretrain_mlm.TASK.make_windows("test", texts, tokenizer, length, MlmSettings.from_dict(VALUES | values))


def causal(tokenizer, texts=TEXTS, length=16, **values):
    return pretrain_clm.TASK.make_windows("test", texts, tokenizer, length, ClmSettings.from_dict(VALUES | values))


def classified(tokenizer, texts=TEXTS, length=16, **values):
    labels = ["a", "b", "a"][: len(texts)]
    settings = ClassifySettings.from_dict(VALUES | {"window_length": 16, "shortest_window": 1} | values)
    return encode_documents(Documents({"train": (texts, labels)}), "train", tokenizer, length, settings)


def same(ours, theirs):
    rows = zip(ours, theirs, strict=True)
    return all(np.array_equal(a[key], b[key]) for a, b in rows for key in ("input_ids", "labels"))


def rows(data):
    return [data[index] for index in range(len(data))]


def open_bpe():
    return load_open_tokenizer(ClmSettings.from_dict(VALUES), TEXTS)


KINDS = {"masked": (masked, bpe), "causal": (causal, open_bpe), "classified": (classified, bpe)}


@pytest.mark.parametrize(("make", "tokenizer"), KINDS.values(), ids=KINDS)
def test_what_was_cut_is_found_again(folder, refuse, make, tokenizer):
    first, tokenizer = make(tokenizer()), tokenizer()
    assert len(list(folder.iterdir())) == 1
    uncached = make(tokenizer, cache_tokens=False)
    refuse()
    found = make(tokenizer)
    assert len(found) > 5
    assert same(rows(found), rows(first))
    assert same(rows(found), rows(uncached))
    if make is not classified:
        assert found.counts() == first.counts()


CHANGES = {
    "texts": {"texts": [*TEXTS[:2], TEXT + "x"]},
    "length": {"length": 15},
    "packing": {"packing": "padding"},
    "words": {"whole_word": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_cut_otherwise_is_not_confused(folder, change):
    masked(bpe())
    expected, found = masked(bpe(), cache_tokens=False, **change), masked(bpe(), **change)
    assert len(list(folder.iterdir())) == 2
    assert same(rows(found), rows(expected))


def test_tokenizers_are_told_apart(folder):
    given, changed = bpe(), bpe()
    changed.add_tokens(["nobody"])
    masked(wordpiece())
    for tokenizer in (given, changed):
        masked(tokenizer)
    assert len(list(folder.iterdir())) == 3
    given(TEXT, truncation=True, max_length=4)  # leaves its traces in the tokenizer
    masked(given)
    assert len(list(folder.iterdir())) == 3


CORRUPT = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "almost whole": lambda file: file.write_bytes(file.read_bytes()[:-300]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "something else": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "a folder": lambda file: (file.unlink(), file.mkdir(), (file / "x").write_text("x")),
}


@pytest.mark.parametrize("corrupt", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize(("make", "tokenizer"), KINDS.values(), ids=KINDS)
def test_a_corrupt_file_is_written_again(folder, caplog, make, tokenizer, corrupt):
    first = [{name: np.array(value) for name, value in row.items()} for row in rows(make(tokenizer()))]
    (file,) = folder.iterdir()
    size = file.stat().st_size
    corrupt(file)
    assert same(first, rows(make(tokenizer())))
    assert f"{file} in the token cache is corrupt" in caplog.text
    assert file.stat().st_size == size


def test_a_full_disk_stops_nothing(monkeypatch, folder, caplog):
    finalize = ArrowWriter.finalize

    def fill(writer, *arguments):
        if writer._path is not None:
            raise OSError(28, "No space left on device")
        return finalize(writer, *arguments)

    expected = masked(bpe(), cache_tokens=False)
    monkeypatch.setattr(ArrowWriter, "finalize", fill)
    found = masked(bpe())
    assert same(rows(found), rows(expected))
    assert not list(folder.glob("*.arrow"))
    assert re.search(
        rf"The token cache {folder} cannot be written .* which needs [\d.]+ MB of space there", caplog.text
    )


def test_texts_without_windows_are_kept_as_none(folder):
    for _ in range(2):
        with pytest.raises(InputError, match="contains no token"):
            masked(bpe(), texts=[""])
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_kept_if_it_is_not_wanted(folder):
    for make, tokenizer in KINDS.values():
        make(tokenizer(), cache_tokens=False)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_stops_nothing(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFICIENT_TRANSFORMERS_CACHE", str(tmp_path / "file/cache"))
    assert cache_file(bpe(), TEXTS, {}) is None
    assert f"The token cache {tmp_path / 'file/cache'} cannot be written" in caplog.text
    assert len(masked(bpe())) > 5


def test_several_processes_cut_as_one():
    alone, together = classified(bpe(), cache_tokens=False), classified(bpe(), cache_tokens=False, num_workers=2)
    assert same(list(alone), list(together))
