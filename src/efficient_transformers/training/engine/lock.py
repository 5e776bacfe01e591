"""Lock an output folder, so that only one run at a time writes to it."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..settings import InputError

LOCK = ".lock"  # in the folder while a run writes to it; the operating system releases it if the process dies


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process. The folder is created if necessary, and removed again if it stays empty.

    Raises InputError if it cannot be written or another process holds the lock; the message has its id and host.
    """
    path = folder / LOCK
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"Another run writes to {folder}: {holder(path)}. Wait until it has ended, stop it, or set out to another."
        ) from None
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be written ({error.strerror}): set out to another.") from None
    with lock:
        path.write_text(json.dumps({"process": os.getpid(), "host": platform.node()}), encoding="utf-8")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for parent in made:
                with suppress(OSError):  # it is not empty
                    parent.rmdir()


def holder(path: Path) -> str:
    """Description of the process recorded in a lock file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # it is being written or removed
        return "a process that has just started or is about to end"


@contextmanager
def hold_for_all(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Let the main process `hold` the folder for all processes of a run. Collective: call it on every rank."""
    error: list[str | None] = [None]
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                held.enter_context(hold(folder))
            except InputError as refused:
                error = [str(refused)]
        broadcast_object_list(error)
        if error[0] is not None:
            raise InputError(error[0])
        yield
