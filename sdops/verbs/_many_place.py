"""The folder of many builds: what they share and what is not finished lies there, and vanishes with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdops.core import files

_PREFIX = ".sdops-shared-"
_LOCK = "lock"


@contextmanager
def place(output: Path) -> Iterator[Path]:
    """A new folder beside an output, where workers of other machines see it, too; those of killed runs go.

    Args:
        output: The first of the builds.
    """
    beside = Path(os.path.realpath(output.parent))
    for folder in beside.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=beside))
    lock = files.open_file(folder / _LOCK, "O_RDWR", "O_CREAT")
    try:
        files.lock(lock)  # tells other runs that this one is alive
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        lock = files.open_file(folder / _LOCK, "O_RDWR", "O_NOFOLLOW")
    except OSError:
        return False  # somebody else's, or just begun
    try:
        return files.try_lock(lock)
    except OSError:
        return False  # who knows, without locks
    finally:
        os.close(lock)
