"""Folders of the repository, for tests that read its files or start processes in it."""

import os
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]


def with_helpers(*folders: Path) -> dict[str, str]:
    """Environment of a process that can import the helpers, and the modules of `folders`."""
    paths = [*map(str, folders), str(HELPERS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
