"""Runs that are killed: at moments spread over their whole length, politely and not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.cli import end, leftovers, merge, save, start, stop_while_writing, wait_until

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: 137}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


def catches_signals(child: subprocess.Popen[str]) -> bool:
    """Whether the run has come so far as to have its handlers installed: Python's own start is not ours to test."""
    for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.fixture
def whole(large: tuple[Path, Path], folder: Path) -> tuple[bytes, float]:
    """What an undisturbed run writes, and the seconds that it takes from its first statement on."""
    child = start(*large, "-o", "whole.safetensors")
    wait_until(lambda: catches_signals(child), child)
    begin = time.monotonic()
    assert end(child).code == 0
    seconds = time.monotonic() - begin
    data = (folder / "whole.safetensors").read_bytes()
    (folder / "whole.safetensors").unlink()
    return data, seconds


def send_at_moments(
    number: signal.Signals, moments: int, large: tuple[Path, Path], whole: tuple[bytes, float], folder: Path
) -> dict[int, int]:
    """Send the signal to run after run, each a little later; returns how often each exit code came."""
    data, seconds = whole
    output, codes, jitter = folder / "out.safetensors", dict[int, int](), random.Random(int(number))
    for moment in range(moments):
        child = start(*large, "-o", output)
        wait_until(lambda child=child: catches_signals(child), child)
        time.sleep((moment + jitter.random()) / moments * seconds)
        child.send_signal(number)
        ended = end(child)
        codes[ended.code] = codes.get(ended.code, 0) + 1
        assert ended.code in (0, CODES[number]), ended
        assert "Traceback" not in ended.err
        if ended.code == 0 or output.exists():
            assert output.read_bytes() == data
            output.unlink()
        if number == signal.SIGKILL:
            assert len(leftovers(folder)) <= 1  # each run removes what the last one left
        else:
            assert list(folder.iterdir()) == []
    return codes


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("moments", [pytest.param(7, id="few"), pytest.param(60, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_at_random_moments(
    number: signal.Signals, moments: int, large: tuple[Path, Path], whole: tuple[bytes, float], folder: Path
) -> None:
    codes = send_at_moments(number, moments, large, whole, folder)
    assert codes.get(CODES[number], 0) >= moments // 2
    assert merge(*large, "-o", "out.safetensors").code == 0
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    assert (folder / "out.safetensors").read_bytes() == whole[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_middle(number: signal.Signals, large: tuple[Path, Path], folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"old")
    child = start(*large, "--force", "-o", "out.safetensors")
    stop_while_writing(child, folder)
    child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    ended = end(child)
    assert (ended.code, ended.out, ended.err) == (CODES[number], "", f"error: {WORDS[number]}\n")
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    assert (folder / "out.safetensors").read_bytes() == b"old"


def test_an_impatient_user(large: tuple[Path, Path], folder: Path) -> None:
    child = start(*large, "-o", "out.safetensors")
    wait_until(lambda: leftovers(folder), child)
    while child.poll() is None:
        child.send_signal(signal.SIGINT)
        time.sleep(0.002)
    ended = end(child)
    assert (ended.code, ended.err) == (130, "error: interrupted\n")
    assert list(folder.iterdir()) == []


def test_a_thread_deep_in_a_decomposition_does_not_keep_the_user_waiting(folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "base.safetensors")]
    for path in paths:
        save(path, {"layer.weight": random.standard_normal((2500, 2500)).astype(np.float16)})
    child = start(*paths[:2], "--base", paths[2], "-m", "tsv-m", "--no-hash", "-o", "out.safetensors")
    wait_until(lambda: leftovers(folder), child)
    time.sleep(2)  # until torch is imported and the work begins, which takes a minute
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    ended = end(child)
    assert time.monotonic() - begin < 15
    assert (ended.code, ended.err) == (130, "error: interrupted\n")
    assert list(folder.iterdir()) == []


def test_a_signal_that_the_parent_ignores_stays_ignored(large: tuple[Path, Path], folder: Path) -> None:
    child = start(*large, "-o", "out.safetensors", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: leftovers(folder), child)
    child.send_signal(signal.SIGHUP)
    assert end(child).code == 0
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]


def test_only_dead_runs_are_cleaned_up_after(large: tuple[Path, Path], folder: Path) -> None:
    alive = start(*large, "--force", "-o", "out.safetensors")
    temporary = stop_while_writing(alive, folder)
    dead = start(*large, "--force", "-o", "out.safetensors")
    wait_until(lambda: len(leftovers(folder)) == 2, dead)
    dead.kill()
    assert end(dead).code == 137
    assert merge(*large, "--force", "-o", "out.safetensors").code == 0
    assert leftovers(folder) == [temporary]
    alive.send_signal(signal.SIGCONT)
    assert end(alive).code == 0
    assert leftovers(folder) == []
