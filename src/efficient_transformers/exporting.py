"""Write a saved model as a folder that opens without this package: its files, and the code that the package has today.

The folders in model_cards/ hold no code: in a checkout the package is installed, and its classes are the ones that
open them. What leaves the checkout gets the code on the way out, so that no copy of it can grow stale.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .registry import VARIANTS

README, CONFIG = "README.md", "config.json"
MODELS = Path(__file__).parent / "models"
# configs that may name code of their own, besides the model's
PREPARATION = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# what a training run keeps beside its model, and what no folder should have published
LEFT_OUT = (
    "checkpoints/*", "checkpoint-*/*", "runs/*", "*.partial", ".*", "*/.*", "*__pycache__/*", "*.pyc",
    "optimizer.*", "scheduler.pt", "rng_state*", "training_args.bin", "trainer_state.json",
)  # fmt: skip
# suffixes that a new repository keeps as large files (its .gitattributes), and the size above which every file is one
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npy", ".npz", ".parquet", ".arrow", ".gz", ".zip")
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class PublicFile:
    """A file that leaves the machine: its path in the folder, bytes, and whether the Hub will keep it by git LFS."""

    path: str
    size: int
    is_large: bool


def public_files(folder: str | Path) -> list[PublicFile]:
    """The files of a folder that may leave the machine, by name. Raises ValueError if there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {folder}: name one that save_pretrained or a training run has written.")
    files = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            size = path.stat().st_size
            files.append(PublicFile(name, size, size > LARGE_BYTES or path.suffix in LARGE_SUFFIXES))
    return files


def export(folder: str | Path, out: str | Path, *, link: bool = False) -> list[Path]:
    """Write the model saved in `folder` to `out`, which must be new or empty, and return the files there.

    A variant of the zoo gets the code that the package has today, whatever lay in `folder`; a model of another kind is
    copied as it is. The metadata of its card name the version and commit of the code. `link` makes symbolic links to
    the files that do not change, instead of copies.

    Raises ValueError if `folder` holds no saved model, or if `out` is not empty or lies within `folder`.
    """
    root, target = Path(folder).resolve(), Path(out).resolve()
    files = public_files(folder)
    if CONFIG not in {file.path for file in files}:
        raise ValueError(f"{folder} holds no saved model: there is no {CONFIG} (save the model by save_pretrained).")
    if target == root or root in target.parents:
        raise ValueError(f"{out} lies within {folder}, which is exported: name another folder.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is not an empty folder: name a new one, or empty it.")
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    ours, kept = is_variant(config), own_code(root)
    for file in files:
        source, copy = root / file.path, target / file.path
        if ours and source.suffix == ".py" and source not in kept:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(source) if link else shutil.copyfile(source, copy)
    if ours:
        write_code(config, target)
    return sorted(path for path in target.rglob("*") if path.is_file())


def is_variant(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of a variant of the zoo?"""
    return config.get("model_type") in {variant.model_type for variant in VARIANTS.values()}


def own_code(root: Path) -> list[Path]:
    """The Python files of a folder that belong to its tokenizer or processor and are none of this package."""
    named: set[str] = set()
    for path in (root / name for name in PREPARATION):
        if path.exists():
            named |= code_files(json.loads(path.read_text(encoding="utf-8")))
    found = [root / name for name in sorted(named) if (root / name).exists() and not (MODELS / name).exists()]
    return [*found, *(Path(needed) for path in found for needed in get_relative_import_files(path))]


def code_files(config: Mapping[str, Any]) -> set[str]:
    """Names of the Python files that the `auto_map` of a config refers to."""
    references = config.get("auto_map", {}).values()
    flat = [name for reference in references for name in (reference if isinstance(reference, list) else [reference])]
    return {f"{name.rpartition('--')[2].split('.')[0]}.py" for name in flat if name}


def write_code(config: dict[str, Any], target: Path) -> None:
    """Write today's code of a variant to `target`, refer to it in config.json, and name its version in the card."""
    variant = VARIANTS[config["model_type"].removeprefix("et_")]
    custom_object_save(variant.model_class(), target)
    if "image_size" in config and (target / "preprocessor_config.json").exists():
        from .models.base_image_processing import EtImageProcessor  # imports Pillow

        custom_object_save(EtImageProcessor, target)
    replace(target / CONFIG, json.dumps({**config, "auto_map": variant.config_class().auto_map}, indent=2) + "\n")
    readme = target / README
    if readme.exists() and (card := ModelCard.load(readme)).data.to_dict():
        for name, value in code_version().items():
            card.data[f"efficient_transformers_{name}"] = value
        replace(readme, f"{str(card).rstrip()}\n")


def replace(path: Path, text: str) -> None:
    """Write a text file, not through a link to another one."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def code_version() -> dict[str, str]:
    """`version` of this package and, where it is known, the `commit`; `-dirty` if tracked files differ from it."""
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
    """The commit that `pip install git+…` has recorded (PEP 610)."""
    try:
        record = distribution("efficient-transformers").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
