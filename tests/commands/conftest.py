from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdops.commands._console import Console
from sdops.commands.main import _run


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SDOPS_")]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR", "_SDOPS_COMPLETE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sdops(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process, without the signal handlers."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = _run(Console(), list(arguments))
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def process() -> Callable[..., Outcome]:
    """The command line as users start it."""

    def call(*arguments: str, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "sdops", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call
