"""What texts are cut into, kept on the disk: the next run with the same texts, tokenizer and settings reads it."""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

FORMAT = 1  # counts changes in how texts are cut, after which nothing older is read
Row = TypeVar("Row")


def cache_folder() -> Path:
    return Path(os.environ.get("EFFICIENT_TRANSFORMERS_CACHE", "~/.cache/efficient_transformers")).expanduser()


def cache_file(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], how: Mapping[str, Any], suffix: str
) -> Path | None:
    """Where the cut `texts` stand: a name that follows from all that they depend on, `how` besides tokenizer and texts.

    None for a tokenizer that is not one of the tokenizers library, whose rules cannot be read off it.
    """
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer
    # what an earlier call has set to cut and pad is no part of the tokenizer
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
        return None  # a home that cannot be written is no reason not to train
    return folder / f"{name.hexdigest()[:40]}{suffix}" if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """The others then find on the disk what it has cut."""
    with PartialState().main_process_first() if PartialState._shared_state else contextlib.nullcontext():
        yield


def cached_rows(path: Path | None, row_class: type[Row], make: Callable[[], list[Row]]) -> list[Row]:
    """Rows of a dataclass whose fields are arrays, from the file or made and written to it."""
    names = [field.name for field in fields(row_class)]  # type: ignore[arg-type]
    if path is None:
        return make()
    with one_process_first():
        if path.exists():
            with (
                contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
                np.load(path) as file,
            ):
                columns = [np.split(file[name], file["ends"][:-1]) for name in names]
                return [row_class(*row) for row in zip(*columns, strict=True)] if len(file["ends"]) else []
        rows = make()
        write_rows(path, rows, names)
        return rows


def write_rows(path: Path, rows: Sequence[Any], names: Sequence[str]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    ends = np.cumsum([len(getattr(row, names[0])) for row in rows], dtype=np.int64)
    columns = {
        name: np.concatenate([getattr(row, name) for row in rows]) if rows else np.array([], np.int32) for name in names
    }
    try:
        with partial.open("wb") as file:
            np.savez(file, ends=ends, **columns)  # type: ignore[arg-type]
        partial.replace(path)
    except OSError:  # a full disk slows the next run down, no more
        partial.unlink(missing_ok=True)
