"""Import installed libraries even if a file next to the running script has the same name."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import distribution
from importlib.util import module_from_spec


def import_installed(name: str) -> None:
    """Import a library from where it is installed.

    Python searches the folder of the script first, where a script with the name of the library would hide it.
    """
    spec = PathFinder.find_spec(name, [str(distribution(name).locate_file(""))])
    if name in sys.modules or spec is None or spec.loader is None:
        return  # already imported, or missing: a later `import` reports it
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
