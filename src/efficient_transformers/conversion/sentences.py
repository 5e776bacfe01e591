"""SentenceTransformers as sources: the files that make the converted folder a SentenceTransformer again.

`modules.json` lists the modules of a model: a Transformer, whose model is converted, then pooling, normalisation or
dense layers, whose files are copied.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import cached_file

MODULES, SETTINGS, LENGTHS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
OWN = "sentence_transformers."  # the code of other classes would be missing from the folder


@dataclass
class SentenceModules:
    """files: path in the folder -> content. names: classes of the modules after the Transformer.

    max_seq_length: texts are truncated to it, in tokens; None uses the tokenizer's length. do_lower_case: as there.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    max_seq_length: int | None = None
    do_lower_case: bool = False

    def write(self, folder: str | Path) -> None:
        for name, content in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        lengths = {"max_seq_length": self.max_seq_length, "do_lower_case": self.do_lower_case}
        (Path(folder) / LENGTHS).write_text(json.dumps(lengths, indent=2) + "\n", encoding="utf-8")


def find_file(source: str | Path, name: str) -> str | None:
    """Path of a file in a folder or a repository on the Hub; None if there is no such file."""
    return cached_file(
        str(source),
        name,
        local_files_only=Path(source).is_dir(),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def read_file(source: str | Path, name: str) -> bytes | None:
    path = find_file(source, name)
    return None if path is None else Path(path).read_bytes()


def parse(content: bytes, name: str, kind: type) -> Any:
    """Parse a JSON file of the source. Raises ValueError, which names the file, if it is not JSON of this kind."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"the source's {name} cannot be read as JSON ({error}): copy or download it again.") from None
    if not isinstance(value, kind):
        raise ValueError(f"the source's {name} must hold a JSON {kind.__name__}, not a {type(value).__name__}.")
    return value


def read_modules(source: str | Path) -> SentenceModules | None:
    """Read the modules of a SentenceTransformer; None if the source is not one.

    Raises ValueError for unsupported modules: the first must be a Transformer in the folder itself, and all must be
    classes of sentence-transformers.
    """
    content = read_file(source, MODULES)
    if content is None:
        return None
    modules = parse(content, MODULES, list)
    rows = [(str(row.get("type", "")), str(row.get("path", ""))) for row in modules if isinstance(row, dict)]
    if not rows or not rows[0][0].endswith(".Transformer") or rows[0][1] not in ("", "."):
        raise ValueError(
            f"the source's {MODULES} must begin with a Transformer in the folder itself, not with {rows[:1]}: save it "
            "again with SentenceTransformer(…).save, or convert the folder of its Transformer alone."
        )
    kept = SentenceModules({MODULES: content})
    for kind, folder in rows:
        if not kind.startswith(OWN):
            raise ValueError(
                f"the source's {MODULES} names {kind!r}, which is not a class of sentence-transformers, so its code "
                "would be missing: convert a folder without it."
            )
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise ValueError(f"the source's {MODULES} names {folder!r}, which lies outside of its folder.")
    for kind, folder in rows[1:]:
        kept.names.append(kind.rpartition(".")[2])
        for name in ("config.json", "model.safetensors"):
            if (found := read_file(source, f"{folder}/{name}")) is not None:
                kept.files[f"{folder}/{name}"] = found
    if (settings := read_file(source, SETTINGS)) is not None:
        parse(settings, SETTINGS, dict)
        kept.files[SETTINGS] = settings
    if (content := read_file(source, LENGTHS)) is not None:
        lengths = parse(content, LENGTHS, dict)
        kept.max_seq_length = lengths.get("max_seq_length")
        kept.do_lower_case = bool(lengths.get("do_lower_case"))
    return kept
