"""The arrows of the layout: imports in the shipped folder point strictly downwards, and to nothing but what travels."""

import ast
import sys
from pathlib import Path

import pytest

import efficient_transformers

MODELS = Path(efficient_transformers.__file__).parent / "models"
FILES = sorted(path for path in MODELS.glob("*.py") if path.stem != "__init__")
TIERS = [
    ["tracing"],
    [
        "checks",
        "signatures",
        "losses",
        "packing",
        "resizing",
        "feature_maps",
        "hashing",
        "slots",
        "sinkhorn",
        "clustering",
    ],
    ["fourier", "triangular", "patterns", "images"],
    ["tiles"],
    ["softmax_attention", "sparse_attention", "blocked_attention", "flex_attention", "linear_attention"],
    ["configuration", "caching", "sinkhorn_attention", "slot_attention", "synthetic_attention"],
    ["attention", "generation"],
    ["reversible"],
    ["kernel_attention", "backbone", "image_processing"],
    ["heads"],
]
TIER = {name: number for number, names in enumerate(TIERS) for name in names}
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def tier(stem: str) -> int:
    return len(TIERS) if stem.startswith("modeling_") else TIER[stem]


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
            assert tier(node.module) < tier(path.stem), f"{path.name} imports {node.module}.py, which is not below it"


def test_no_variant_is_forgotten():
    assert {path.stem.removeprefix("modeling_") for path in MODELS.glob("modeling_*.py")} == set(
        efficient_transformers.VARIANTS
    )
