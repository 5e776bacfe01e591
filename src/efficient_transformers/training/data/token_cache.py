"""Cache tokenized windows on disk, for later runs with the same texts, tokenizer and settings."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
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

LOG = logging.getLogger(__name__)
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
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        warn_unwritable(folder, error)
        return None  # training also works without a cache
    return folder / f"{name.hexdigest()[:40]}.arrow"


def warn_unwritable(folder: Path, error: Exception, size: int | None = None) -> None:
    needed = "" if size is None else f", which needs {size / 1e6:,.1f} MB of space there,"
    LOG.warning(
        f"The token cache {folder} cannot be written ({error}): the next run tokenizes again. Make it writable{needed} "
        "set EFFICIENT_TRANSFORMERS_CACHE to another folder, or set cache_tokens to false."
    )


def remove_corrupt(file: Path) -> None:
    """Remove the file, or the parts that several processes wrote, with a warning if one cannot be read to its end."""
    parts = list(file.parent.glob(f"{file.stem}*"))
    try:
        for part in parts:
            with pa.memory_map(str(part)) as source, pa.ipc.open_stream(source) as stream:
                stream.read_all().validate(full=True)
    except (OSError, pa.ArrowException) as error:
        LOG.warning(f"{part} in the token cache is corrupt ({error}): the texts are tokenized again.")
        for part in parts:
            with contextlib.suppress(OSError):  # then it cannot be written either, which is reported
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


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

    `options` are those of `Dataset.map`. A corrupt file is written again, with a warning. If it cannot be written, a
    warning says how much space it needs, and the result is kept in memory, as without a file.
    """
    options = {"batched": True, "remove_columns": table.column_names, **options}
    if file is None:
        return table.map(cut, **options)
    with one_process_first():
        remove_corrupt(file)
        try:
            return table.map(cut, cache_file_name=str(file), new_fingerprint=file.stem, **options)
        except (OSError, pa.ArrowException) as error:
            for left in file.parent.glob(f"{file.stem}*"):  # with several processes, one file each
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
            failure = error
    result = table.map(cut, **options)
    warn_unwritable(file.parent, failure, result.data.nbytes)
    return result


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
