"""Let the n-th system call fail, for every n until a merge passes: how SQLite tests its commits.

Whatever fails, the error is one that users understand, the output is whole or not there, nothing else is left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdops
from sdops.errors import OutputError, SdopsError
from tests.faults.conftest import state

WRITES = ("pwrite", "ftruncate", "fsync", "fchmod")
NAMINGS = ("link", "replace")
READS = ("preadv", "fstat")


class Countdown:
    """Lets the n-th call of any of some functions of `os` fail."""

    def __init__(self, names: tuple[str, ...], number: int, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = nth
        for name in names:
            monkeypatch.setattr(os, name, self.failing(getattr(os, name), number))

    def failing(self, real: Callable[..., Any], number: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    @property
    def struck(self) -> bool:
        return self.left <= 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run shall read its inputs for their hashes, too."""
    monkeypatch.setenv("SDOPS_CACHE", os.devnull)


@pytest.fixture
def whole(pair: tuple[Path, Path], folder: Path) -> bytes:
    sdops.merge(*pair, output="whole.safetensors")
    data = (folder / "whole.safetensors").read_bytes()
    (folder / "whole.safetensors").unlink()
    return data


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "replaced"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("names", "kind"),
    [(WRITES, OutputError), (NAMINGS, OutputError), (READS, SdopsError)],
    ids=["write", "name", "read"],
)
def test_every_operation_may_fail(
    names: tuple[str, ...],
    kind: type[SdopsError],
    number: int,
    old: bytes | None,
    pair: tuple[Path, Path],
    whole: bytes,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = folder / "out.safetensors"
    inputs = [(state(path), path.read_bytes()) for path in pair]
    for nth in range(1, 10_000):
        if old is not None:
            output.write_bytes(old)
        before = open_files()
        with monkeypatch.context() as patch:
            countdown = Countdown(names, number, nth, patch)
            error = attempt(pair, output, force=old is not None)
        if not countdown.struck:
            break
        check(error, kind, output, old, whole)
        assert open_files() == before
        assert [(state(path), path.read_bytes()) for path in pair] == inputs
        output.unlink(missing_ok=True)
        assert list(folder.iterdir()) == []
    assert nth > 1
    assert error is None
    assert output.read_bytes() == whole


def attempt(pair: tuple[Path, Path], output: Path, *, force: bool) -> Exception | None:
    try:
        sdops.merge(*pair, output=output, force=force, jobs=1)
    except Exception as error:  # noqa: BLE001  whatever it is, it is judged
        error.__cause__ = error.__context__ = None  # let go of what their frames hold
        return error.with_traceback(None)
    return None


def check(error: Exception | None, kind: type[SdopsError], output: Path, old: bytes | None, whole: bytes) -> None:
    found = output.read_bytes() if output.exists() else None
    if error is None:  # the failure could be worked around
        assert found == whole
        return
    assert isinstance(error, kind), error
    assert "`/" in error.message
    assert found in (old, whole)
