"""Documents from a bundled corpus, a local file or the Hub, a list for each split; documents.py adds labels."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.model_selection import train_test_split

from ..settings import REPOSITORY, InputError, Settings, find_path, ranged

BUNDLED = {"era": REPOSITORY / "data" / "sotu"}
Source = Literal["bundled", "local", "hub", "generated"]
SPLITS = ("train", "validation", "test")
ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
HELD_OUT = 0.15  # share of the training data for each split without a file
SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")

Row = tuple[str, dict[str, Any]]  # a description of its place for errors, and the columns
Tables = dict[str, tuple[str, list[Row]]]  # split → name of the source, rows
Example = TypeVar("Example")


@dataclass
class TextSettings(Settings):
    """Settings for documents."""

    text_column: str = "text"
    more_data: list[str] = field(default_factory=list)  # files whose documents are added to the training data
    cache_tokens: bool = True  # cache the tokenized windows: see token_cache.py
    num_workers: int | None = ranged(None, least=1)  # processes that tokenize; default: the tokenizer's own threads


def source_of(data: str) -> Source:
    """Where the setting `data` is found, as in the loaders; other names are those of generated data."""
    if data in BUNDLED:
        return "bundled"
    if find_path(data) is not None or Path(data).suffix in SUFFIXES or data.startswith((".", "/", "~")):
        return "local"
    return "hub" if "/" in data else "generated"


def load_texts(settings: TextSettings) -> dict[str, list[str]]:
    """Load the documents of all three splits, ignoring other columns."""
    return load_splits(settings, lambda row: text_of(row, settings))


def stream_texts(settings: TextSettings) -> tuple[Callable[[], Iterator[str]], dict[str, list[str]]]:
    """Return a function that starts reading the training documents, and the other two splits, read in full."""
    files = _find_files(settings)
    if "train" in files:
        _, path = files.pop("train")
        rows, tables = partial(_read_file, path), _read_files(files)
    else:
        rows, tables = _stream_hub(settings, skip=list(files))
        tables |= _read_files(files)
    for split in SPLITS[1:]:
        if split not in tables:
            raise InputError(
                f"There is no {split} data, and streaming cannot cut it from documents that are not read yet: "
                f"set {split}_data, or streaming to false."
            )
        if not tables[split][1]:
            raise InputError(f"The {split} data ({tables[split][0]}) is empty: it needs at least one document.")
    held = {split: [text_of(row, settings) for row in tables[split][1]] for split in SPLITS[1:]}
    return lambda: (text_of(row, settings) for row in itertools.chain(rows(), _more_rows(settings))), held


def load_splits(
    settings: TextSettings,
    example: Callable[[Row], Example],
    label: Callable[[Example], str] | None = None,
    label_column: str | None = None,
) -> dict[str, list[Example]]:
    """Load all three splits and convert each row with `example`; missing splits are cut from the training documents.

    With `label`, a function of an example, the cut is stratified by label. `label_column` is the column of labels:
    labels of datasets on the Hub are converted to names, and a split without published labels is not used.
    """
    tables = _read_tables(settings, label_column)
    tables["train"][1].extend(_more_rows(settings))
    splits = {name: [example(row) for row in rows] for name, (_, rows) in tables.items()}
    for name, examples in splits.items():
        if not examples:
            raise InputError(f"The {name} data ({tables[name][0]}) is empty: it needs at least one document.")
    held = max(1, round(HELD_OUT * len(splits["train"])))
    for name in SPLITS[1:]:
        if name not in splits:
            strata = [label(one) for one in splits["train"]] if label else None
            splits["train"], splits[name] = _hold_out(splits["train"], strata, name, held, settings.split_seed)
    return {name: splits[name] for name in SPLITS}


def text_of(row: Row, settings: TextSettings) -> str:
    place, _ = row
    text = value_of(row, "text_column", settings)
    if not isinstance(text, str):
        raise InputError(f"The column {settings.text_column!r} must be text, but {place} has {text!r}.")
    return text


def value_of(row: Row, setting: str, settings: TextSettings) -> Any:
    """The value in the column that is named by a setting."""
    (place, columns), name = row, getattr(settings, setting)
    if name not in columns:
        there = ", ".join(sorted(map(str, columns)))
        raise InputError(f"{place[0].upper()}{place[1:]} has no column {name!r}; there are: {there}. Set {setting}.")
    return columns[name]


def _hold_out(
    examples: list[Example], strata: Sequence[str] | None, name: str, held: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cut a split from the training documents, stratified if there are enough documents of every stratum."""
    left = len(examples) - held
    if left < 2:
        raise InputError(
            f"{len(examples)} documents are too few to cut a {name} split from: add documents, or set {name}_data."
        )
    if strata is not None:
        counts = Counter(strata)
        strata = strata if min(counts.values()) >= 2 and min(held, left) >= len(counts) else None
    kept, kept_out = train_test_split(range(len(examples)), test_size=held, random_state=seed, stratify=strata)
    return [examples[i] for i in sorted(kept)], [examples[i] for i in sorted(kept_out)]


def _read_tables(settings: TextSettings, label_column: str | None) -> Tables:
    files = _find_files(settings)
    return _read_files(files) if "train" in files else _read_hub(settings, label_column) | _read_files(files)


def _read_files(files: dict[str, tuple[str, Path]]) -> Tables:
    return {split: (name, list(_read_file(path))) for split, (name, path) in files.items()}


def _more_rows(settings: TextSettings) -> Iterator[Row]:
    for name in settings.more_data:
        if (path := find_path(name)) is None:
            raise InputError(f"There is no file {name}: correct the setting more_data.")
        yield from _read_file(path)


def _find_files(settings: TextSettings) -> dict[str, tuple[str, Path]]:
    """Split → name and path of its file; without a training file if the data are on the Hub."""
    files: dict[str, tuple[str, Path]] = {}
    where = BUNDLED.get(settings.data) or find_path(settings.data)
    if where is None and (Path(settings.data).suffix in SUFFIXES or settings.data.startswith((".", "/", "~"))):
        raise InputError(f"There is no file {settings.data}: correct the setting data.")
    if where is not None:
        files = _files_of_folder(where) if where.is_dir() else {"train": (settings.data, where)}
    for split, name in (("validation", settings.validation_data), ("test", settings.test_data)):
        if name is not None:
            path = find_path(name)
            if path is None:
                raise InputError(f"There is no file {name}: correct the setting {split}_data.")
            files[split] = name, path
    return files


def _files_of_folder(folder: Path) -> dict[str, tuple[str, Path]]:
    found = {split: sorted(path for path in folder.glob(f"{split}.*") if path.suffix in SUFFIXES) for split in SPLITS}
    found |= {split: [folder / split] for split in SPLITS if not found[split] and _texts_in(folder / split)}
    if not found["train"]:
        if _texts_in(folder):
            return {"train": (folder.name, folder)}
        raise InputError(
            f"The folder {folder} has no train file: it needs train.jsonl, train.csv, train.parquet, or .txt files, "
            "each of which is a document."
        )
    return {split: (paths[0].name, paths[0]) for split, paths in found.items() if paths}


def _read_file(path: Path) -> Iterator[Row]:
    if path.is_dir():
        for file in _texts_in(path):
            yield f"the file {file.name}", {"text": _read_text(file)}
        return
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".csv":
            yield from _read_csv(path)
        elif path.suffix == ".txt":
            for number, paragraph in enumerate(re.split(r"\n\s*\n", _read_text(path)), start=1):
                if paragraph.strip():
                    yield f"paragraph {number} of {path.name}", {"text": paragraph}
        elif path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    yield f"row {number} of {path.name}", row
        else:
            raise InputError(f"{path.name} is none of {', '.join(SUFFIXES)}: convert it to one of these.")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _texts_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.txt") if path.is_file())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding=ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text in UTF-8: {error}") from error


def _read_csv(path: Path) -> Iterator[Row]:
    """Rows by the names of the header. An unquoted comma makes a row longer than the header."""
    # the default limit of a field, 128 KiB, is less than a long document
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding=ENCODING) as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise InputError(f"The header of {path.name} names {repeated[0]!r} more than once: rename one of them.")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise InputError(
                    f"Line {reader.line_num} of {path.name} has {len(row)} fields and the header {len(header)} "
                    f"({', '.join(header)}): put values with commas in double quotes."
                )
            yield f"line {reader.line_num} of {path.name}", dict(zip(header, row, strict=True))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding=ENCODING) as lines:
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


def _stream_hub(settings: TextSettings, skip: Sequence[str]) -> tuple[Callable[[], Iterator[Row]], Tables]:
    """Stream the training rows, and load the other splits except those in `skip`."""
    try:
        loaded: Any = datasets.load_dataset(settings.data, settings.data_config, streaming=True)
    except Exception as error:  # errors of the Hub have no common class
        raise InputError(f"data ({settings.data!r}) could not be streamed from the Hub: {error}") from error
    if "train" not in loaded:
        raise InputError(f"The data set {settings.data} has no split 'train'; it has {', '.join(map(str, loaded))}.")

    def rows(split: str) -> Iterator[Row]:
        for number, row in enumerate(loaded[split], start=1):
            yield f"row {number} of {settings.data}/{split}", row

    held = [split for split in SPLITS[1:] if split in loaded and split not in skip]
    return partial(rows, "train"), {split: (f"{settings.data}/{split}", list(rows(split))) for split in held}


def _read_hub(settings: TextSettings, label_column: str | None) -> Tables:
    try:
        loaded: Any = datasets.load_dataset(settings.data, settings.data_config)
    except Exception as error:  # errors of the Hub have no common class
        raise InputError(
            f"data ({settings.data!r}) is not a bundled corpus ({', '.join(BUNDLED)}) or a local file or folder, "
            f"and could not be loaded from the Hub: {error}"
        ) from error
    if "train" not in loaded:
        raise InputError(f"The data set {settings.data} has no split 'train'; it has {', '.join(map(str, loaded))}.")
    tables = {}
    for split in SPLITS:
        if split in loaded:
            table = loaded[split]
            label = table.features.get(label_column)
            of_list = getattr(label, "feature", None)  # for a column of lists, such as the tags of words
            if isinstance(label, datasets.ClassLabel):
                names = [_name(label, value) for value in table[label_column]]
                table = table.remove_columns(label_column).add_column(label_column, names)
            elif isinstance(of_list, datasets.ClassLabel):
                names = [[_name(of_list, value) for value in values] for values in table[label_column]]
                table = table.remove_columns(label_column).add_column(label_column, names)
            rows = [(f"row {number} of {settings.data}/{split}", row) for number, row in enumerate(table, start=1)]
            # a test split without published labels (-1 on the Hub) cannot be used; one is cut from training instead
            if label_column is None or not all(row.get(label_column, "") is None for _, row in rows):
                tables[split] = (f"{settings.data}/{split}", rows)
    return tables


def _name(label: datasets.ClassLabel, value: int) -> str | None:
    return str(label.int2str(value)) if value >= 0 else None
