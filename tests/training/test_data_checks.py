"""Rows that do not fit their header, classes that look like slips, and plain text files."""

from collections import Counter

import pytest
from training_runs import MODEL, TINY, TINY_LANGUAGE, read_metrics, write_config, write_rows

from efficient_transformers.training.data.classes import check_classes, class_notes
from efficient_transformers.training.data.documents import load_documents
from efficient_transformers.training.data.texts import load_texts
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks.classify import ClassifySettings

HEADER = "text,label\n"
ROWS = [f"document {i},{'odd' if i % 2 else 'even'}\n" for i in range(40)]


def settings_of(path):
    return ClassifySettings.from_dict({"data": str(path), "tokenizer": "data/tokenizer", "model": MODEL})


BAD_ROWS = {
    "comma": ("one, two,odd\n", r"Line 42 of a\.csv has 3 fields and the header 2 \(text, label\): put values"),
    "short": ("one\n", r"Line 42 of a\.csv has 1 fields and the header 2"),
    "quote": ('"one,odd\n', r"a\.csv cannot be read as \.csv"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path, row, message):
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "".join(ROWS) + row)
    with pytest.raises(InputError, match=message):
        load_documents(settings_of(path))


def test_a_quoted_comma_a_blank_line_and_a_byte_order_mark_are_fine(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\ufeff" + HEADER + "".join(ROWS) + '\n"one, two\nthree",odd\n', encoding="utf-8")
    documents = load_documents(settings_of(path))
    assert documents.labels == ["even", "odd"]
    assert "one, two\nthree" in [text for texts, _ in documents.splits.values() for text in texts]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,label\n" + "a,b,c\n" * 9)
    with pytest.raises(InputError, match="names 'label' more than once"):
        load_documents(settings_of(path))


# --- classes


def test_classes_that_look_like_slips_are_named():
    notes = class_notes(Counter({"war": 9, "War ": 3, "peace": 8, "truce": 1}))
    assert notes[0].startswith("Classes with one training example: truce.")
    assert "'War ' and 'war'" in notes[1]
    assert not class_notes(Counter({"war": 2, "peace": 2}))


def test_a_class_for_nearly_every_document_is_refused(tmp_path):
    check_classes(Counter(map(str, range(19))), "The column 'label'")  # too few to tell
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": f"title {i // 2 * 2 + i % 5}"} for i in range(60)])
    with pytest.raises(InputError, match=r"The column 'label' has \d+ classes in \d+ training examples"):
        load_documents(settings_of(path))


def test_a_run_shows_what_looks_like_a_slip(tmp_path, capsys):
    names = ["peace", "war", "War"]
    rows = [{"text": f"we are at {names[i % 3]}", "label": names[i % 3]} for i in range(60)]
    config = write_config(
        tmp_path, TINY, write_rows(tmp_path / "a.jsonl", rows), max_steps=1, eval_steps=1, gradient_accumulation=1
    )
    train.main(["--config", str(config)])
    assert "Classes that differ by case or blanks alone: 'War' and 'war'." in capsys.readouterr().out


# --- plain text


def test_a_text_file_has_a_document_for_each_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i}\nof two lines" for i in range(20)) + "\n\n\n")
    splits = load_texts(settings_of(path))
    assert sum(map(len, splits.values())) == 20
    assert splits["train"][0].endswith("\nof two lines")


def test_a_folder_of_text_files_has_a_document_for_each(tmp_path):
    for i in range(20):
        (tmp_path / "texts" / f"part {i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / f"part {i % 3}" / f"{i}.txt").write_text(f"one\n\ndocument {i}")
    splits = load_texts(settings_of(tmp_path / "texts"))
    assert sum(map(len, splits.values())) == 20
    for split in ("train", "test"):
        (tmp_path / "split" / split).mkdir(parents=True)
        for i in range(9):
            (tmp_path / "split" / split / f"{i}.txt").write_text(f"{split} {i}")
    splits = load_texts(settings_of(tmp_path / "split"))
    assert splits["test"] == [f"test {i}" for i in range(9)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"\.txt files, each of which is a document"):
        load_texts(settings_of(tmp_path / "empty"))


def test_text_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt cannot be read as text in UTF-8"):
        load_texts(settings_of(path))


def test_a_language_model_is_trained_on_text_files(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("we are at war with the states of the union . " * 5)
    config = write_config(
        tmp_path, TINY_LANGUAGE | {"task": "pretrain_clm"}, tmp_path, max_steps=1, eval_steps=1, gradient_accumulation=1
    )
    train.main(["--config", str(config)])
    assert sum(split["documents"] for split in read_metrics(tmp_path / "out")["data"].values()) == 12
