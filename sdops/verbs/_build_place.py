"""Folders for what is worked out on the way: they vanish with the run, and those of killed runs with the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdops import hub
from sdops.core import files

_PREFIX = ".sdops-shared-"
_LOCK = "lock"


@contextmanager
def place(folder: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, whatever happens; those of killed runs go before.

    Args:
        folder: Where it is made: beside the output there is room, and workers of other machines see it, too.
    """
    import shutil  # which brings all of Python's compression along

    beside = Path(os.path.realpath(folder))
    for other in beside.glob(f"{_PREFIX}*"):
        if _is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    # the name is on record before the folder exists, so that a signal in between leaves nothing behind
    made, lock = beside / f"{_PREFIX}{os.urandom(8).hex()}", -1
    try:
        made.mkdir(mode=0o700)
        lock = _locked(made)
        yield made
    finally:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def streamed_once(folder: Path, *, again: bool) -> Iterator[None]:
    """Have files that are streamed come over the net once.

    Args:
        folder: Of the output: there they lie meanwhile, if once through is not enough.
        again: Whether it is not.
    """
    if not (again and hub.is_streaming()):
        yield
        return
    with place(folder) as own, hub.held(own):
        yield


def _locked(folder: Path) -> int:
    """Tell other runs that this one is alive; they never see the lock's file without its lock."""
    begun = folder / f"{_LOCK}.begun"
    lock = files.open_file(begun, "O_RDWR", "O_CREAT")
    files.lock(lock)
    if not files.HOLDS_NAMES:  # where there are no locks, either
        begun.rename(folder / _LOCK)
    return lock


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
