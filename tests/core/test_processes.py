"""Forked workers: the same results as threads, errors that come back whole, nothing left running."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from sdops.core import native, processes, run
from sdops.errors import FormatError, SdopsError
from sdops.verbs.merge import Merge, merge
from tests import tiny


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every merge in more than one process, however small, and although the tests have torch loaded."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(run, "FORK_BYTES", 0)
    monkeypatch.setattr(run, "can_fork", lambda: True)
    monkeypatch.setattr(run, "JOB_BYTES", 1000)


def test_tasks_are_shared_and_tallied() -> None:
    done: list[int] = []
    written: list[int] = []

    def perform(task: int) -> int:
        done.append(task)
        return task

    tallies = processes.share(range(10), 3, perform, lambda: (os.getpid(), tuple(done)), written.append)
    assert [tasks for _, tasks in tallies] == [(0, 3, 6, 9), (1, 4, 7), (2, 5, 8)]
    assert len({pid for pid, _ in tallies} | {os.getpid()}) == 4
    assert sorted(written) == list(range(10))
    assert done == []


def test_an_error_comes_back_as_it_was_raised() -> None:
    def perform(task: int) -> int:
        raise FormatError("broken", hint="mend it", key=f"w{task}")

    with pytest.raises(FormatError, match="broken") as caught:
        processes.share([1], 1, perform, list, lambda _: None)
    assert (caught.value.hint, caught.value.data) == ("mend it", {"key": "w1"})


def test_an_error_that_cannot_be_sent_is_described() -> None:
    def perform(_: int) -> int:
        raise ValueError("odd", lambda: None)

    with pytest.raises(RuntimeError, match="ValueError"):
        processes.share([1], 1, perform, list, lambda _: None)


def test_a_worker_that_is_killed_is_noticed() -> None:
    def perform(_: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(SdopsError, match="killed"):
        processes.share([1, 2], 2, perform, list, lambda _: None)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nobody is left


@pytest.mark.parametrize("jobs", [2, 5])
def test_processes_write_what_one_thread_writes(jobs: int, tmp_path: Path, forked: None) -> None:
    a, b = tiny.write(tmp_path / "a.safetensors", tiny.checkpoint(0)), dict(tiny.checkpoint(1))
    b[tiny.LARGE] = ("F16", np.full_like(b[tiny.LARGE][1], 60000))
    second = tiny.write(tmp_path / "b.safetensors", b)
    reports, outputs = [], []
    for count in (1, jobs):
        lazy = merge(a, second, method="weighted-sum", alpha=1.5)
        assert isinstance(lazy, Merge)
        outputs.append(tmp_path / f"{count}.safetensors")
        reports.append(lazy.save(outputs[-1], jobs=count).data)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert reports[0]["overflows"] == reports[1]["overflows"] != {}
    for name, share in reports[0]["retained"].items():
        assert reports[1]["retained"][name] == pytest.approx(share, rel=1e-9)


def test_nan_is_named_by_a_worker(tmp_path: Path, forked: None) -> None:
    bad = dict(tiny.checkpoint(1))
    values = bad[tiny.LARGE][1].copy()
    values[0, 0] = np.nan
    bad[tiny.LARGE] = ("F16", values)
    a = tiny.write(tmp_path / "a.safetensors", tiny.checkpoint(0))
    b = tiny.write(tmp_path / "b.safetensors", bad)
    with pytest.raises(FormatError, match=r"b\.safetensors.*1 NaN"):
        merge(a, b, output=tmp_path / "out.safetensors", jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.safetensors", "b.safetensors"]
