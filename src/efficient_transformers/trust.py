"""Code that comes with a model: it is listed, and refused unless the caller allows it.

Nothing in a folder can grant trust. `trust_remote_code` is an argument of every function that opens a tokenizer or a
model, False by default, and an option of every command that may run foreign code. Settings files cannot set it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING
from transformers.utils import cached_file

from .folders import CONFIG

# configs that may name code of their own, besides the model's
PREPARATION = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
ALLOW = (
    "Read it, and allow it with --trust_remote_code (in Python trust_remote_code=True); a settings file cannot allow it"
)


class UntrustedCodeError(ValueError):
    """Opening a model needs code that comes with it, which the caller did not allow."""


class Reference(NamedTuple):
    """A class in a Python file: in another repository on the Hub, or, if repository is "", in the same folder."""

    repository: str
    file: str
    class_name: str

    def named_by(self, config: str) -> str:
        """Describe the class for messages: `file.py (class X, named by tokenizer_config.json)`."""
        place = f"{self.file} of {self.repository}" if self.repository else self.file
        return f"{place} (class {self.class_name}, named by {config})"


@contextmanager
def refusing_code(source: str | Path) -> Iterator[None]:
    """Convert transformers' refusal to run the code of `source` into an UntrustedCodeError that names the code."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UntrustedCodeError) or "trust_remote_code" not in str(error):
            raise
        raise UntrustedCodeError(
            f"{source} can only be opened by running code that comes with it: "
            f"{'; '.join(named_classes(source)) or 'see its files'}. {ALLOW}."
        ) from None


def named_classes(source: str | Path) -> list[str]:
    """The code that opening a folder or a model on the Hub would run, as described by `Reference.named_by`."""
    configs = {name: read_config(source, name) for name in (CONFIG, *PREPARATION)}
    return [
        reference.named_by(name)
        for name, config in configs.items()
        if config.get("model_type") not in CONFIG_MAPPING  # otherwise an installed class opens it
        for reference in references(config)
    ]


def read_config(source: str | Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder or a Hub repository; empty if it does not exist or cannot be read."""
    try:
        path = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def references(config: Mapping[str, Any]) -> list[Reference]:
    """The classes that the `auto_map` of a config refers to, each of them once."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    found: dict[Reference, None] = {}
    for text in (name for value in values for name in (value if isinstance(value, list) else [value])):
        if isinstance(text, str):
            repository, _, name = text.rpartition("--")
            module, _, class_name = name.partition(".")
            found[Reference(repository, f"{module}.py", class_name)] = None
    return list(found)
