"""Merges that are large enough for worker processes: signals and deaths of either side."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.cli import end, leftovers, merge, sparse, start, wait_until

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code works in threads; processes are for numpy."""
    monkeypatch.setenv("SDOPS_NATIVE", "0")


@pytest.fixture
def huge(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of 300 MB that take no room on the disk."""
    return sparse(tmp_path / "huge_a.safetensors", 150_000_000), sparse(tmp_path / "huge_b.safetensors", 150_000_000)


def workers(child: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    give_up = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < give_up:
        time.sleep(0.01)
    return not any(map(alive, pids))


def started(huge: tuple[Path, Path], folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A run whose two workers have begun to write, and are stopped."""
    child = start(*huge, "-j", "2", "-o", folder / "out.safetensors", "--no-hash")
    wait_until(lambda: len(workers(child)) == 2 and leftovers(folder), child)
    pids = workers(child)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return child, pids


@pytest.mark.parametrize("number", CODES)
def test_signals(number: signal.Signals, huge: tuple[Path, Path], folder: Path) -> None:
    child, pids = started(huge, folder)
    child.send_signal(number)
    assert end(child).code == CODES[number]
    assert gone(pids)
    assert list(folder.iterdir()) == []


def test_a_worker_is_killed(huge: tuple[Path, Path], folder: Path) -> None:
    child, pids = started(huge, folder)
    os.kill(pids[0], signal.SIGKILL)
    ended = end(child)
    assert (ended.code, "worker process was killed" in ended.err) == (1, True)
    assert gone(pids)
    assert list(folder.iterdir()) == []


def test_workers_end_with_their_parent(huge: tuple[Path, Path], folder: Path) -> None:
    child, pids = started(huge, folder)
    child.kill()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    child.communicate()  # returns when the workers, too, have let go of its streams
    assert gone(pids)
    assert leftovers(folder)
    assert merge(*huge, "-o", folder / "out.safetensors", "--no-hash").code == 0
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
