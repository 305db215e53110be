"""Builds that end badly: LoRAs that steps make for others stay nowhere, those of killed builds until the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import sdops
from sdops.errors import OutputError
from tests import tiny

RECIPE = """
[inputs]
a = "m0.safetensors"
b = "m1.safetensors"
[[steps]]
id = "style"
verb = "extract"
tuned = "a"
base = "b"
rank = 4
[[steps]]
verb = "apply"
model = "b"
lora = ["style:0.5"]
"""
PATIENCE = 60.0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the output."""
    for seed in range(2):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    (tmp_path / "r.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def stopped(when: Callable[[], bool]) -> subprocess.Popen[str]:
    """A build that is frozen as soon as something is so."""
    command = [sys.executable, "-m", "sdops", "build", "r.toml", "-o", "out/made.safetensors"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + PATIENCE
    while not when():
        assert child.poll() is None, f"ended too early: {child.communicate()}"
        assert time.monotonic() < give_up
        time.sleep(0.0005)
    child.send_signal(signal.SIGSTOP)
    return child


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_build_leaves_goes_with_the_next(place: Path, number: signal.Signals) -> None:
    child = stopped(lambda: any(place.glob(".sdops-*/style/*.safetensors")))
    child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    child.communicate(timeout=PATIENCE)
    assert child.returncode in (128 + number, -number)
    assert bool(list(place.iterdir())) == (number == signal.SIGKILL)
    sdops.build("r.toml", output="out/made.safetensors")
    assert os.listdir(place) == ["made.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals")
def test_a_build_that_is_alive_keeps_its_folder(place: Path) -> None:
    child = stopped(lambda: any(place.glob(".sdops-*/style/*.safetensors")))
    sdops.build("r.toml", output="out/other.safetensors")
    child.send_signal(signal.SIGCONT)
    assert child.wait(timeout=PATIENCE) == 0, child.communicate()
    assert sorted(os.listdir(place)) == ["made.safetensors", "other.safetensors"]
    child.communicate()


def test_an_error_after_the_lora_is_there_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdops.core import sink

    seen: list[list[Path]] = []
    real = sink.check_space

    def full(target: Path, nbytes: int) -> None:
        if target.name == "made.safetensors":
            seen.append(list(place.glob(".sdops-*/style/*.safetensors")))
            raise OutputError("no space left")
        real(target, nbytes)

    monkeypatch.setattr(sink, "check_space", full)
    with pytest.raises(OutputError, match="no space left"):
        sdops.build("r.toml", output="out/made.safetensors")
    assert seen[-1]
    assert not list(place.iterdir())
