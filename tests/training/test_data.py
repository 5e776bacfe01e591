"""The bundled corpus, and the reading and cutting of labelled documents."""

import csv
import json

import datasets
import prepare
import pyarrow.parquet as pq
import pytest
from repository import ROOT
from transformers import AutoTokenizer

from efficient_transformers.training.data import documents
from efficient_transformers.training.data.documents import (
    DocumentSettings,
    cut_windows,
    encode_documents,
    load_documents,
)
from efficient_transformers.training.settings import InputError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def addresses():
    return {split: pq.read_table(ROOT / f"data/sotu/{split}.parquet").to_pylist() for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/tokenizer")


def settings(data, **values):
    return DocumentSettings(data=str(data), model={"model_type": "bert"}, **values)


# --- the corpus


def test_every_address_is_in_one_split(addresses):
    keys = [(row["year"], row["name"]) for rows in addresses.values() for row in rows]
    assert len(keys) == len(set(keys)) == 233
    assert {split: len(rows) for split, rows in addresses.items()} == {"train": 163, "validation": 35, "test": 35}


@pytest.mark.parametrize(
    ("year", "first", "last"),
    [(1790, 1790, 1829), (1829, 1790, 1829), (1830, 1830, 1869), (1869, 1830, 1869), (1870, 1870, 1912),
     (1912, 1870, 1912), (1913, 1913, 1945), (1946, 1946, 1980), (1981, 1981, 2021), (2021, 1981, 2021)],
)  # fmt: skip
def test_era_of_a_year(year, first, last):
    assert prepare.era_of(year) == f"{first}\N{EN DASH}{last}"


@pytest.mark.parametrize("year", [1789, 2022])
def test_a_year_outside_the_eras_is_refused(year):
    with pytest.raises(ValueError, match=f"year \\({year}\\) must lie between 1790 and 2021"):
        prepare.era_of(year)


def test_eras_are_right_and_in_proportion_in_every_split(addresses):
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        eras = [row["era"] for row in addresses[split]]
        assert eras == [prepare.era_of(row["year"]) for row in addresses[split]]
        for era in set(eras):
            total = sum(row["era"] == era for rows in addresses.values() for row in rows)
            assert abs(eras.count(era) - share * total) <= 1.5, (split, era)
        assert len(set(eras)) == 6


def test_preparing_again_gives_the_same_splits(addresses, tmp_path):
    rows = [row for split in addresses.values() for row in split]
    rows.sort(key=lambda row: (row["year"], row["name"]))
    for split, again in prepare.split_addresses(rows).items():
        prepare.write_split(again, tmp_path / f"{split}.parquet")
        assert pq.read_table(tmp_path / f"{split}.parquet").equals(pq.read_table(ROOT / f"data/sotu/{split}.parquet"))


def test_files_are_small_enough_for_git():
    assert all(path.stat().st_size < 4_000_000 for path in (ROOT / "data").rglob("*") if path.is_file())


def test_the_tokenizer_comes_from_the_training_split_alone(addresses, tokenizer):
    again = prepare.train_tokenizer(row["text"] for row in addresses["train"])
    assert json.loads(again.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_the_tokenizer_serves_encoders_and_decoders(tokenizer):
    assert len(tokenizer) == 4096
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert (
        (tokenizer.bos_token, tokenizer.eos_token) == (tokenizer.cls_token, tokenizer.sep_token) == ("[CLS]", "[SEP]")
    )
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token) == ("[PAD]", "[UNK]", "[MASK]")
    batch = tokenizer(["We, the people", "We"], padding=True)
    assert {ids[0] for ids in batch["input_ids"]} == {tokenizer.cls_token_id}
    assert batch["input_ids"][0][-1] == tokenizer.sep_token_id
    assert batch["input_ids"][1][-1] == tokenizer.pad_token_id  # padding on the right


@pytest.mark.parametrize("text", ["Fellow-Citizens  of\tthe Senate:\n", "naïve — “1790” 🙂 漢", " [x] "])
def test_no_text_is_lost_in_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# --- windows


def content(windows):
    return [token for window in windows for token in window[1:-1]]


def test_windows_cover_the_text_without_overlap(tokenizer):
    text = " ".join(f"word{i}" for i in range(40))
    ids = tokenizer(text)["input_ids"]
    windows, sources, *_ = cut_windows([text, "short"], tokenizer, 16, window_length=16)
    assert [len(window) for window in windows[: sources.count(0) - 1]] == [16] * (sources.count(0) - 1)
    assert content(window for window, source in zip(windows, sources, strict=True) if source == 0) == ids[1:-1]
    assert all(window[0] == ids[0] and window[-1] == ids[-1] for window in windows)
    assert sources == sorted(sources)
    assert sources.count(1) == 1


@pytest.mark.parametrize(("rest", "kept"), [(3, False), (4, True)])
def test_a_short_rest_is_dropped(tokenizer, rest, kept):
    # one token a letter; 14 fill a window of 16, and the rest counts its two special tokens
    text = " a" * (14 + rest - 2)
    windows, *_ = cut_windows([text], tokenizer, 16, window_length=16, shortest_window=4)
    assert [len(window) for window in windows] == ([16, rest] if kept else [16])


def test_a_short_only_window_is_kept(tokenizer):
    windows, sources, *_ = cut_windows(["a", "b"], tokenizer, 16, window_length=16, shortest_window=10)
    assert [len(window) for window in windows] == [3, 3]
    assert sources == [0, 1]


def test_max_length_cuts_the_same_windows(tokenizer):
    text = " a b c d e f g" * 10
    whole, whole_sources, *_ = cut_windows([text], tokenizer, 16, window_length=16, shortest_window=4)
    cut, sources, *_ = cut_windows([text], tokenizer, 7, window_length=16, shortest_window=4)
    assert sources == whole_sources
    assert cut == [window if len(window) <= 7 else [*window[:6], window[-1]] for window in whole]


def test_without_windows_a_text_is_one_example(tokenizer):
    windows, sources, *_ = cut_windows([" a" * 50, "b"], tokenizer, 8)
    assert [len(window) for window in windows] == [8, 3]
    assert sources == [0, 1]


def test_the_era_task(tokenizer):
    era = settings("era", label_column="era", mask_digits=True, window_length=4096)
    loaded = load_documents(era)
    assert loaded.labels == [prepare.era_of(year) for year in prepare.LAST_YEARS]
    # only the test split is encoded, which takes a second; it stands in for the others
    windows = encode_documents(loaded, "test", tokenizer, 4096, era).column("input_ids")
    assert len(windows) == 100
    assert all(512 <= len(window) <= 4096 for window in windows)
    assert not set("123456789") & set("".join(tokenizer.batch_decode(windows)))


# --- files of the user's own

ROWS = [{"text": f"document {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_is_read_and_split(tmp_path, suffix):
    loaded = load_documents(settings(write(tmp_path / f"documents{suffix}"))).splits
    assert {split: len(texts) for split, (texts, _) in loaded.items()} == {"train": 28, "validation": 6, "test": 6}
    pairs = [pair for texts, labels in loaded.values() for pair in zip(texts, labels, strict=True)]
    assert sorted(pairs) == sorted((row["text"], row["label"]) for row in ROWS)
    assert all(set(labels) == {"odd", "even"} for _, labels in loaded.values())


def test_the_cut_follows_split_seed_alone(tmp_path):
    path = write(tmp_path / "documents.jsonl")
    first = load_documents(settings(path, seed=1)).splits
    assert load_documents(settings(path, seed=2)).splits == first
    assert load_documents(settings(path, split_seed=1)).splits != first


def test_a_long_field_of_csv_is_read(tmp_path):
    rows = [{**row, "text": row["text"] + "x" * 200_000} for row in ROWS]
    assert len(load_documents(settings(write(tmp_path / "long.csv", rows))).splits["train"][0][0]) > 200_000


def test_splits_of_their_own_are_not_mixed(tmp_path):
    train, test = write(tmp_path / "a.jsonl", ROWS[:30]), write(tmp_path / "b.csv", ROWS[30:])
    loaded = load_documents(settings(train, test_data=str(test)))
    assert loaded.splits["test"][0] == [row["text"] for row in ROWS[30:]]
    assert len(loaded.splits["train"][0]) + len(loaded.splits["validation"][0]) == 30


def test_columns_can_have_other_names_and_labels_be_numbers(tmp_path):
    rows = [{"body": str(i), "stars": 10 if i % 2 else 9} for i in range(20)]
    loaded = load_documents(settings(write(tmp_path / "a.jsonl", rows), text_column="body", label_column="stars"))
    assert loaded.labels == ["9", "10"]


def test_a_hub_data_set_with_class_names_and_a_withheld_test_split(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_list([{"text": str(i), "label": i % 2} for i in range(30)], features=features)
    test = datasets.Dataset.from_list([{"text": "secret", "label": -1}], features=features)
    loaded = datasets.DatasetDict(train=train, test=test)
    monkeypatch.setattr(documents.datasets, "load_dataset", lambda name, config: loaded if name == "a/b" else None)
    splits = load_documents(settings("a/b")).splits
    assert set(splits["train"][1]) == {"no", "yes"}
    assert "secret" not in splits["test"][0]


BAD_FILES = {
    "empty": ("a.jsonl", "", r"The train data \(.*a.jsonl\) is empty"),
    "not JSON": ("a.jsonl", '{"text": "a", "label": "x"}\n\n{"text": oops}\n', "Line 3 of a.jsonl is not JSON"),
    "not an object": ("a.jsonl", "[1]\n", "Line 1 of a.jsonl must be a JSON object, not a list"),
    "no column": (
        "a.jsonl",
        '{"words": "a", "kind": 1}\n',
        "no column 'text'; there are: kind, words. Set text_column",
    ),
    "no label": ("a.csv", "text,kind\na,b\n", "Line 2 of a.csv has no column 'label'; there are: kind, text"),
    "text is a number": ("a.jsonl", '{"text": 5, "label": "x"}\n', "must be text, but line 1 of a.jsonl has 5"),
    "null label": (
        "a.jsonl",
        '{"text": "a", "label": null}\n',
        "'label' must name a class .* line 1 of a.jsonl has None",
    ),
    "a score": ("a.jsonl", '{"text": "a", "label": 0.5}\n', "must name a class .* has 0.5"),
    "one label": (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n' * 9,
        "only the label 'x': a classifier needs at least two",
    ),
    "too few": ("a.jsonl", '{"text": "a", "label": "x"}\n', "1 documents are too few to cut a validation split"),
    "broken quotes": ("a.csv", 'text,label\n"a"b,c\n', "cannot be read as .csv"),
    "not parquet": ("a.parquet", "PAR", "cannot be read as .parquet"),
    "other kind": ("a.pdf", "hello", r"a\.pdf is none of .jsonl, .csv, .parquet.*: convert it"),
    "text without classes": ("a.txt", "hello", "a.txt has no column .label.; there are: text. Set label_column"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_documents(settings(tmp_path / name))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"cannot be read as \.jsonl"):
        load_documents(settings(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_training_lacks_is_refused(tmp_path, split):
    train = write(tmp_path / "train.jsonl")
    other = write(tmp_path / "other.jsonl", [{"text": "a", "label": "strange"}])
    with pytest.raises(InputError, match=f"The {split} data has labels that are missing in the training data: strange"):
        load_documents(settings(train, **{f"{split}_data": str(other)}))


@pytest.mark.parametrize("data", ["missing.jsonl", "./missing", "/no/such.csv"])
def test_a_missing_file_is_named(data):
    with pytest.raises(InputError, match=f"There is no file {data}: correct the setting data"):
        load_documents(settings(data))


def test_a_missing_test_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file nowhere.csv: correct the setting test_data"):
        load_documents(settings(write(tmp_path / "a.jsonl"), test_data="nowhere.csv"))


def test_a_folder_needs_a_train_file(tmp_path):
    write(tmp_path / "test.csv")
    with pytest.raises(InputError, match="has no train file"):
        load_documents(settings(tmp_path))


def test_an_unknown_name_says_what_was_tried(monkeypatch):
    def refuse(name, config):
        raise ConnectionError("no network")

    monkeypatch.setattr(documents.datasets, "load_dataset", refuse)
    with pytest.raises(
        InputError, match=r"'somebody/data'\) is not a bundled corpus \(era\).*from the Hub: no network"
    ):
        load_documents(settings("somebody/data"))
