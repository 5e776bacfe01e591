"""The arrows of the layout, as models/__init__.py and training/__init__.py describe them."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import efficient_transformers

MODELS = Path(efficient_transformers.__file__).parent / "models"
FILES = sorted(path for path in MODELS.glob("*.py") if path.stem != "__init__")
TIERS = ["ops", "attn", "base", "modeling"]  # prefixes of the files, from the lowest
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def tier(stem: str) -> int:
    return TIERS.index(stem.partition("_")[0])


def siblings(path: Path) -> set[str]:
    """Modules of the folder that a module imports."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] in ALLOWED
            assert node.module != "__future__", "a `config: XConfig` annotation must stay a class"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path.name}:{node.lineno} leaves the folder"
            assert node.module, f"{path.name}:{node.lineno} must say `from .sibling import name`"
            assert "." not in node.module, f"{path.name}:{node.lineno} must say `from .sibling import name`"
            assert tier(node.module) <= tier(path.stem), f"{path.name} imports {node.module}.py, of a higher tier"
            assert not node.module.startswith("modeling_"), f"{path.name} imports the variant {node.module}.py"


def test_no_circle_of_imports():
    tuple(TopologicalSorter({path.stem: siblings(path) for path in FILES}).static_order())  # raises CycleError


def test_operations_do_without_transformers():
    for path in FILES:
        if path.stem.startswith("ops_"):
            assert not re.search(r"^\s*(from|import) transformers\b", path.read_text(), flags=re.M), path.name


def test_no_variant_is_forgotten():
    assert {path.stem.removeprefix("modeling_") for path in MODELS.glob("modeling_*.py")} == set(
        efficient_transformers.VARIANTS
    )


# --- any_model

ANY_MODEL = MODELS.parent / "any_model"
ANY_MODEL_TIERS = ["rules", "masks", "cache", "attention", "positions", "configure", "report"]


@pytest.mark.parametrize("stem", ANY_MODEL_TIERS)
def test_any_model_imports_downwards(stem):
    """Of the rest of the package the shipped folder, the table of sources for a message, counts of pairs, and trust."""
    below = {ANY_MODEL / f"{name}.py" for name in ANY_MODEL_TIERS[: ANY_MODEL_TIERS.index(stem)]}
    others = {MODELS.parent / name for name in ("conversion/__init__.py", "costs.py", "trust.py")}
    allowed = below | set(FILES) | others
    assert imported_modules(ANY_MODEL / f"{stem}.py") <= allowed


def test_no_file_of_any_model_is_forgotten():
    assert {path.stem for path in ANY_MODEL.glob("*.py")} == {"__init__", *ANY_MODEL_TIERS}


# --- training

PACKAGE = MODELS.parent
TRAINING = PACKAGE / "training"
SUBPACKAGES = ["settings", "data", "synthetic", "engine", "tasks", "runs"]  # each imports only those before it
STANDALONE = "runs/check_published.py"  # runs where the package cannot be imported


def imported_modules(path: Path) -> set[Path]:
    """Modules of the package that a module imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("efficient_transformers") for alias in node.names), path
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = path.parents[node.level - 1]
        elif names[0] == "efficient_transformers":
            folder, names = PACKAGE, names[1:]
        else:
            continue
        target = folder.joinpath(*names)
        for name in [alias.name for alias in node.names]:
            module = (target / name).with_suffix(".py")
            init = target / "__init__.py"
            found.add(module if module.exists() else init if init.exists() else target.with_suffix(".py"))
    return found


def test_nothing_else_in_the_package_imports_training():
    for path in PACKAGE.rglob("*.py"):
        if not path.is_relative_to(TRAINING):
            assert not any(module.is_relative_to(TRAINING) for module in imported_modules(path)), path


def test_the_subpackages_of_training_import_downwards_and_without_a_circle():
    graph = {path: imported_modules(path) for path in TRAINING.rglob("*.py")}
    assert len(graph) > 30
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    tiers = {path: SUBPACKAGES.index(path.relative_to(TRAINING).parts[0].removesuffix(".py"))
             for path in graph if path.parent != TRAINING or path.stem != "__init__"}  # fmt: skip
    for path, modules in graph.items():
        for module in modules & tiers.keys():
            assert tiers[module] <= tiers[path], f"{path} imports {module}, which is not below it"


def test_the_check_of_published_models_imports_nothing_of_the_package():
    assert imported_modules(TRAINING / STANDALONE) == set()
