"""Cache tokenized windows on disk, for later runs with the same texts, tokenizer and settings."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from .coverage import Coverage

FORMAT = 2  # incremented when the cutting of texts changes, which invalidates older files
Row = TypeVar("Row")


def cache_folder() -> Path:
    return Path(os.environ.get("EFFICIENT_TRANSFORMERS_CACHE", "~/.cache/efficient_transformers")).expanduser()


def cache_file(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], how: Mapping[str, Any]) -> Path | None:
    """File for the windows of `texts`; its name depends on the tokenizer, the texts, and all other settings in `how`.

    The fingerprints of datasets are not used, because they change with each call that sets the tokenizer's truncation.
    None for a tokenizer that is not from the tokenizers library, whose rules cannot be read.
    """
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer
    # truncation and padding set by an earlier call are not part of the tokenizer
    rules = json.loads(backend.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    rules |= {"special": tokenizer.all_special_ids, "end": tokenizer.eos_token_id, "separator": tokenizer.sep_token_id}
    name = hashlib.sha256(json.dumps([FORMAT, rules, how], sort_keys=True).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        name.update(len(encoded).to_bytes(8, "little") + encoded)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # training also works without a cache
    return folder / f"{name.hexdigest()[:40]}.arrow" if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """Let one process write the cache first; the others then read it."""
    with PartialState().main_process_first() if PartialState._shared_state else contextlib.nullcontext():
        yield


def cached_map(
    table: datasets.Dataset,
    cut: Callable[..., dict[str, list[Any]]],
    file: Path | None,
    **options: Any,
) -> datasets.Dataset:
    """Apply `cut` to batches of the table; read the result from the file if it exists, and otherwise write it.

    `options` are those of `Dataset.map`. A file that cannot be read is removed. If the disk is full, the result is kept
    in memory, as without a file.
    """
    options = {"batched": True, "remove_columns": table.column_names, **options}
    if file is not None:
        with one_process_first():
            try:
                return table.map(cut, cache_file_name=str(file), new_fingerprint=file.stem, **options)
            except (OSError, pa.ArrowException):
                for left in file.parent.glob(f"{file.stem}*"):  # with several processes, one file each
                    left.unlink(missing_ok=True)
    return table.map(cut, **options)


class Pack(Protocol[Row]):
    """Cuts texts into rows, and sets `coverage` for the texts of the last call."""

    coverage: Coverage

    def __call__(self, texts: list[str]) -> list[Row]: ...


def cached_rows(
    pack: "Pack[Row]", row_class: type[Row], texts: list[str], file: Path | None
) -> tuple[list[Row], Coverage]:
    """Apply `pack` to the texts; return its rows, of a dataclass of int32 arrays, and its `coverage`."""
    if file is None:
        return pack(texts), pack.coverage
    names = [field.name for field in fields(row_class)]  # type: ignore[arg-type]

    def columns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = pack(batch["text"])
        arrays = {name: [getattr(row, name) for row in rows] for name in names}
        return arrays | {name: [count] * len(rows) for name, count in pack.coverage.to_dict().items()}

    table = cached_map(datasets.Dataset.from_dict({"text": texts}), columns, file, batch_size=None)
    if not len(table):
        return [], Coverage(len(texts), len(texts))
    found: Any = table.select_columns(names).with_format("numpy", dtype=np.int32)[:]
    counts = table.remove_columns(names)[0]
    return [row_class(*arrays) for arrays in zip(*(found[name] for name in names), strict=True)], Coverage(**counts)
