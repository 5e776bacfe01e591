"""Labelled documents from a bundled corpus, a local file or the Hub, and the token windows a classifier reads."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from settings import REPOSITORY, InputError, Settings, find_path
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

BUNDLED = {"era": REPOSITORY / "data" / "sotu"}
SPLITS = ("train", "validation", "test")
HELD_OUT = 0.15  # of the training data, for each split that has no file of its own
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass
class DocumentSettings(Settings):
    """How labelled documents are read and cut."""

    text_column: str = "text"
    label_column: str = "label"
    mask_digits: bool = False  # every digit becomes 0, so that a number cannot give the label away
    window_length: int | None = None  # tokens of a window, special tokens included; default: one example a document
    shortest_window: int = 512  # a shorter rest of a document is dropped, unless it is the only window

    def check(self) -> None:
        super().check()
        if self.window_length is not None and self.window_length < 8:
            raise InputError(f"window_length ({self.window_length}) must be at least 8 tokens.")
        if self.window_length and self.max_length and self.max_length > self.window_length:
            raise InputError(
                f"max_length ({self.max_length}) must not exceed window_length ({self.window_length}): "
                "a window has no more tokens to see."
            )


@dataclass
class Documents:
    """Texts and the names of their labels, one split each."""

    splits: dict[str, tuple[list[str], list[str]]]

    @property
    def labels(self) -> list[str]:
        """The training labels' names: in numeric order where all are whole numbers, else in alphabetic order."""
        names = set(self.splits["train"][1])
        try:
            return sorted(names, key=int)
        except ValueError:
            return sorted(names)


def load_documents(settings: DocumentSettings) -> Documents:
    """All three splits, checked; those without data of their own are cut from the training documents."""
    tables = _read_tables(settings)
    splits = {name: _texts_and_labels(rows, source, settings) for name, (source, rows) in tables.items()}
    for name, (texts, _) in splits.items():
        if not texts:
            raise InputError(f"The {name} data ({tables[name][0]}) is empty: it needs at least one document.")
    held = max(1, round(HELD_OUT * len(splits["train"][0])))
    for name in SPLITS[1:]:
        if name not in splits:
            splits["train"], splits[name] = _hold_out(*splits["train"], name, held, settings.split_seed)

    known = set(splits["train"][1])
    if len(known) < 2:
        raise InputError(f"The training data has only the label {known.pop()!r}: a classifier needs at least two.")
    for name in SPLITS[1:]:
        unseen = sorted(set(splits[name][1]) - known)
        if unseen:
            raise InputError(
                f"The {name} data has labels that the training data lacks: {', '.join(unseen)}. "
                "Remove these documents or add some to the training data."
            )
    return Documents({name: splits[name] for name in SPLITS})


def _read_tables(settings: DocumentSettings) -> dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Split → (name of the source, rows); a row comes with the place to name in an error."""
    where = BUNDLED.get(settings.data) or find_path(settings.data)
    if where is None and (Path(settings.data).suffix in SUFFIXES or settings.data.startswith((".", "/", "~"))):
        raise InputError(f"There is no file {settings.data}: correct the setting data.")
    if where is None:
        tables = _read_hub(settings)
    elif where.is_dir():
        found = {split: sorted(p for p in where.glob(f"{split}.*") if p.suffix in SUFFIXES) for split in SPLITS}
        files = {split: paths[0] for split, paths in found.items() if paths}
        if "train" not in files:
            raise InputError(f"The folder {where} has no train file: it needs train.jsonl, train.csv or train.parquet.")
        tables = {split: (path.name, list(_read_file(path))) for split, path in files.items()}
    else:
        tables = {"train": (settings.data, list(_read_file(where)))}
    for split, name in (("validation", settings.validation_data), ("test", settings.test_data)):
        if name is not None:
            path = find_path(name)
            if path is None:
                raise InputError(f"There is no file {name}: correct the setting {split}_data.")
            tables[split] = (name, list(_read_file(path)))
    return tables


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".csv":
            # the default limit of a field, 128 KiB, is less than a long document
            csv.field_size_limit(2**31 - 1)
            with path.open(newline="", encoding="utf-8") as lines:
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    yield f"line {reader.line_num} of {path.name}", row
        elif path.suffix == ".parquet":
            for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
                yield f"row {number} of {path.name}", row
        else:
            raise InputError(f"{path.name} is none of {', '.join(SUFFIXES)}: convert it to one of these.")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"Line {number} of {path.name} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path.name} must be a JSON object, not a {type(row).__name__}.")
            yield f"line {number} of {path.name}", row


def _read_hub(settings: DocumentSettings) -> dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]]:
    try:
        loaded: Any = datasets.load_dataset(settings.data, settings.data_config)
    except Exception as error:  # the Hub's failures have no common class
        raise InputError(
            f"data ({settings.data!r}) is no bundled corpus ({', '.join(BUNDLED)}), no file or folder here, "
            f"and could not be loaded from the Hub: {error}"
        ) from error
    if "train" not in loaded:
        raise InputError(f"The data set {settings.data} has no split 'train'; it has {', '.join(map(str, loaded))}.")
    tables = {}
    for split in SPLITS:
        if split in loaded:
            table = loaded[split]
            if isinstance(table.features.get(settings.label_column), datasets.ClassLabel):
                label = table.features[settings.label_column]
                names = [label.int2str(value) if value >= 0 else None for value in table[settings.label_column]]
                table = table.remove_columns(settings.label_column).add_column(settings.label_column, names)
            rows = [(f"row {number} of {settings.data}/{split}", row) for number, row in enumerate(table, start=1)]
            # a test split whose labels are withheld (-1 on the Hub) cannot be used; one is cut from training instead
            if not all(row.get(settings.label_column, "") is None for _, row in rows):
                tables[split] = (f"{settings.data}/{split}", rows)
    return tables


def _texts_and_labels(
    rows: Sequence[tuple[str, dict[str, Any]]], source: str, settings: DocumentSettings
) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for place, row in rows:
        for setting in ("text_column", "label_column"):
            if getattr(settings, setting) not in row:
                there = ", ".join(sorted(map(str, row)))
                raise InputError(
                    f"{place[0].upper()}{place[1:]} has no column {getattr(settings, setting)!r}; there are: {there}. "
                    f"Set {setting}."
                )
        text, label = row[settings.text_column], row[settings.label_column]
        if not isinstance(text, str):
            raise InputError(f"The column {settings.text_column!r} must be text, but {place} has {text!r}.")
        if label is None or label == "" or isinstance(label, float | list | dict):
            raise InputError(
                f"The column {settings.label_column!r} must name a class (text or a whole number), "
                f"but {place} has {label!r}."
            )
        texts.append(text)
        labels.append(str(label))
    return texts, labels


def _hold_out(
    texts: list[str], labels: list[str], name: str, held: int, seed: int
) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Cuts a split from the training documents, every label in proportion where there are enough of each."""
    counts = Counter(labels)
    if len(texts) - held < 2:
        raise InputError(
            f"{len(texts)} documents are too few to cut a {name} split from: give more, or set {name}_data."
        )
    stratify = labels if min(counts.values()) >= 2 and min(held, len(texts) - held) >= len(counts) else None
    kept, kept_out = train_test_split(range(len(texts)), test_size=held, random_state=seed, stratify=stratify)
    return tuple(([texts[i] for i in sorted(part)], [labels[i] for i in sorted(part)]) for part in (kept, kept_out))  # type: ignore[return-value]


def encode_documents(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, max_length: int, settings: DocumentSettings
) -> dict[str, datasets.Dataset]:
    """Splits of windows with `input_ids` and `labels`, in memory: nothing is left in a cache folder."""
    ids = {name: i for i, name in enumerate(documents.labels)}

    def windows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [re.sub(r"\d", "0", text) if settings.mask_digits else text for text in batch["text"]]
        kept, sources = cut_windows(texts, tokenizer, max_length, settings.window_length, settings.shortest_window)
        return {"input_ids": kept, "labels": [ids[batch["label"][source]] for source in sources]}

    encoded = {}
    for name, (texts, labels) in documents.splits.items():
        table = datasets.Dataset.from_dict({"text": texts, "label": labels})
        encoded[name] = table.map(
            windows, batched=True, batch_size=64, remove_columns=["text", "label"], desc=f"tokenising {name}"
        )
    return encoded


def cut_windows(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    window_length: int | None = None,
    shortest_window: int = 1,
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every window and the index of its text.

    Windows have `window_length` tokens with the special ones, and do not overlap. Of each the first `max_length` are
    kept, so that runs with different `max_length` see the same windows; the special tokens at the end stay.
    Without `window_length` a text is one window.
    """
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=window_length or max_length,
        return_overflowing_tokens=window_length is not None,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    sources = encoded["overflow_to_sample_mapping"] if window_length is not None else list(range(len(texts)))
    windows, kept_sources = [], []
    previous = None
    for tokens, special, source in zip(encoded["input_ids"], encoded["special_tokens_mask"], sources, strict=True):
        first, previous = source != previous, source
        if window_length is not None and not first and len(tokens) < shortest_window:
            continue
        if len(tokens) > max_length:
            tail = special[::-1].index(0) if 0 in special else 0
            tokens = tokens[: max_length - tail] + tokens[len(tokens) - tail :]
        windows.append(tokens)
        kept_sources.append(source)
    return windows, kept_sources
