"""Write a saved model as a folder that opens without this package: its files, and the current code of the package.

The folders in model_cards/ contain no code, because in a checkout the package is installed and its classes open them.
The code is added on export, so that no copy of it becomes outdated.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .folders import CONFIG, INDEX, check_folder, load_card, parse_json, parse_yaml, read_json
from .registry import VARIANTS
from .trust import PREPARATION, references

README = "README.md"
MODELS = Path(__file__).parent / "models"
# files that belong to a model; everything else in a folder is not published
PUBLISHED = (
    README, CONFIG, "generation_config.json", "model.safetensors", "model-*.safetensors", INDEX,
    "adapter_config.json", "adapter_model.safetensors", "model.onnx", "onnx/*.onnx", "onnx/*.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.*",
    "preprocessor_config.json", "processor_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",  # sentence-transformers
    "[0-9]_*/config.json", "[0-9]_*/model.safetensors",
    "metrics.json", "settings.yaml", "pattern.png", "LICENSE", "LICENSE.*", "NOTICE",
)  # fmt: skip
# files in which a training run or transformers may record local paths, and the form of such a path in a text
WITH_PATHS = (CONFIG, "settings.yaml", "metrics.json", "tokenizer_config.json", "adapter_config.json")
ROOTS = "home|Users|root|tmp|mnt|media|data|var|opt|srv|private|workspace|content|scratch|Volumes"
LOCAL_PATH = re.compile(rf"(?<![\w.:/~-])/(?:{ROOTS})/[^\s\"'`<>|:,;()\[\]{{}}]+")
# suffixes that a new repository stores as large files (its .gitattributes), and the size above which every file is one
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npy", ".npz", ".parquet", ".arrow", ".gz", ".zip")
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class PublicFile:
    """A file to publish: its path in the folder, its size in bytes, and whether the Hub stores it with git LFS."""

    path: str
    size: int
    is_large: bool


@dataclass(frozen=True)
class Selection:
    """The files of a folder to publish, and the reason for each file left out: path → reason."""

    files: list[PublicFile]
    left_out: dict[str, str]


def select_files(folder: str | Path) -> Selection:
    """Select the files of a folder that belong to a model (`PUBLISHED`, and code that a config names).

    A link is followed only if it stays within the folder. Raises ValueError if the folder does not exist.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ValueError(f"There is no folder {folder}: name one written by save_pretrained or a training run.")
    code = {path.relative_to(root).as_posix() for path in named_code(root)}
    files, left_out = [], {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if root not in path.resolve().parents:
            left_out[name] = "a link out of the folder"
        elif path.is_file() and (name in code or any(fnmatch(name, pattern) for pattern in PUBLISHED)):
            files.append(public_file(root, name))
        elif path.is_file():
            left_out[name] = "not a part of a model"
    return Selection(files, left_out)


def public_file(root: Path, name: str) -> PublicFile:
    size = (root / name).stat().st_size
    return PublicFile(name, size, size > LARGE_BYTES or Path(name).suffix in LARGE_SUFFIXES)


def public_files(folder: str | Path) -> list[PublicFile]:
    """The files of a folder to publish, by name. Raises ValueError if the folder does not exist."""
    return select_files(folder).files


def export(folder: str | Path, out: str | Path, *, link: bool = False) -> list[Path]:
    """Write the model saved in `folder` to `out`, which must be new or empty, and return the files there.

    A variant of the zoo gets the current code of the package, whatever code `folder` contains; other models are copied
    unchanged. The metadata of the card name the version and commit of the code. With `link`, files that do not change
    become symbolic links instead of copies. Only files that belong to a model are written (`select_files`), and
    absolute local paths in the text files are reduced to their last part.

    Raises ValueError if `folder` contains no saved model, if a file cannot be read, or if `out` is not empty or inside
    `folder`.
    """
    root, target = Path(folder).resolve(), Path(out).resolve()
    selection = select_files(folder)
    if CONFIG not in {file.path for file in selection.files}:
        reason = selection.left_out.get(CONFIG, "missing: save the model with save_pretrained")
        raise ValueError(f"{folder} contains no saved model: {CONFIG} is {reason}.")
    check_folder(root)
    if target == root or root in target.parents:
        raise ValueError(f"{out} is inside {folder}, which is exported: choose another folder.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is not an empty folder: choose a new one, or empty it.")
    config = read_json(root / CONFIG)
    ours, kept = is_variant(config), own_code(root)
    for file in selection.files:
        source, copy = root / file.path, target / file.path
        if ours and source.suffix == ".py" and source not in kept:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(source) if link else shutil.copyfile(source, copy)
    remove_local_paths(target)
    if ours:
        write_code(config, target)
    return sorted(path for path in target.rglob("*") if path.is_file())


def is_variant(config: Mapping[str, Any]) -> bool:
    """True if this is the config.json of a variant of the zoo."""
    return config.get("model_type") in {variant.model_type for variant in VARIANTS.values()}


def own_code(root: Path) -> list[Path]:
    """The Python files of a folder that belong to its tokenizer or processor and not to this package."""
    return [path for path in named_code(root, PREPARATION) if not (MODELS / path.name).exists()]


def named_code(root: Path, configs: Iterable[str] = (CONFIG, *PREPARATION)) -> list[Path]:
    """The Python files of a folder that its configs name in `auto_map`, and the files imported by them."""
    named: set[str] = set()
    for path in (root / name for name in configs):
        if path.is_file():
            named |= code_files(read_json(path))
    found = [root / name for name in sorted(named) if Path(name).name == name and (root / name).is_file()]
    return [*found, *(Path(needed) for path in found for needed in get_relative_import_files(path))]


def code_files(config: Mapping[str, Any]) -> set[str]:
    """Names of the Python files that the `auto_map` of a config refers to."""
    return {reference.file for reference in references(config)}


def foreign_code(folder: str | Path) -> list[str]:
    """Descriptions of the code, other than this package's, that opening the export of a folder would run.

    The export of a variant has the package's own code for the model; its tokenizer or processor may need other code.
    """
    root = Path(folder)
    ours = is_variant(read_json(root / CONFIG))
    return [
        reference.named_by(name)
        for name in (CONFIG, *PREPARATION)
        if (root / name).is_file() and not (ours and name == CONFIG)
        for reference in references(read_json(root / name))
        if reference.repository or not (ours and (MODELS / reference.file).exists())
    ]


def write_code(config: dict[str, Any], target: Path) -> None:
    """Write the current code of a variant to `target`, refer to it in config.json, and name its version in the card."""
    variant = VARIANTS[config["model_type"].removeprefix("et_")]
    custom_object_save(variant.model_class(), target)
    if "image_size" in config and (target / "preprocessor_config.json").exists():
        from .models.base_image_processing import EtImageProcessor  # imports Pillow

        custom_object_save(EtImageProcessor, target)
    replace(target / CONFIG, json.dumps({**config, "auto_map": variant.config_class().auto_map}, indent=2) + "\n")
    readme = target / README
    if readme.exists() and (card := load_card(readme)).data.to_dict():
        for name, value in code_version().items():
            card.data[f"efficient_transformers_{name}"] = value
        replace(readme, f"{str(card).rstrip()}\n")


def remove_local_paths(folder: Path) -> None:
    """Reduce absolute local paths in the text files of `folder` to their last part."""
    found: set[str] = set()

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        if not isinstance(value, str):
            return value
        if Path(value).is_absolute() and len(Path(value).parts) > 2:
            found.add(value)
            return Path(value).name
        return LOCAL_PATH.sub(lambda path: Path(path[0]).name, value)

    for path in (folder / name for name in WITH_PATHS if (folder / name).is_file()):
        is_yaml = path.suffix == ".yaml"
        before = parse_yaml(path) if is_yaml else parse_json(path)
        if (after := cut(before)) != before:
            text = (
                yaml.safe_dump(after, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(after, indent=2)
            )
            replace(path, f"{text.rstrip()}\n")
    if (readme := folder / README).is_file():
        text = before = readme.read_text(encoding="utf-8")
        for name in sorted(found, key=len, reverse=True):
            text = text.replace(name, Path(name).name)
        text = LOCAL_PATH.sub(lambda path: Path(path[0]).name, text)
        if text != before:
            replace(readme, text)


def replace(path: Path, text: str) -> None:
    """Write a text file, replacing a link instead of writing through it."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def code_version() -> dict[str, str]:
    """`version` of this package and, if known, the `commit`; `-dirty` if tracked files differ from it."""
    from . import __version__

    commit = checkout_commit() or installed_commit()
    return {"version": __version__, **({"commit": commit} if commit else {})}


def checkout_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def installed_commit() -> str | None:
    """The commit recorded by `pip install git+…` (PEP 610)."""
    try:
        record = distribution("efficient-transformers").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
