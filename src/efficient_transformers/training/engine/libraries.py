"""Libraries that are imported from where they are installed, whatever lies beside the script that runs."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import distribution
from importlib.util import module_from_spec


def import_installed(name: str) -> None:
    """Import a library under its name.

    Python searches the folder of the script first, where a script of the library's name would hide it.
    """
    spec = PathFinder.find_spec(name, [str(distribution(name).locate_file(""))])
    if name in sys.modules or spec is None or spec.loader is None:
        return  # `import` finds it, or says that it is missing
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
