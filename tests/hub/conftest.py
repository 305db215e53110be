from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import Blob, HubServer


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture(scope="session")
def started() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(started: HubServer) -> HubServer:
    """The server, empty."""
    started.repositories.clear()
    started.contents.clear()
    started.faults.clear()
    started.forget()
    started.redirects, started.xet = True, False
    return started


@pytest.fixture(scope="session")
def usual(started: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What tells huggingface_hub where the Hub is."""
    return {
        "HF_ENDPOINT": started.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf") / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def home(usual: dict[str, str]) -> Path:
    """HF_HOME, empty."""
    folder = Path(usual["HF_HOME"])
    shutil.rmtree(folder, ignore_errors=True)
    return folder


class Zygote:
    """A process that runs command lines in copies of itself."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.hub.zygote"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=outside() | environment,
            cwd=Path(__file__).parents[2],
        )

    def run(self, arguments: list[str], environment: dict[str, str], folder: Path) -> Outcome:
        out, err = folder / ".out", folder / ".err"
        wish = {
            "arguments": arguments,
            "environment": outside() | environment,
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
        }
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        done = Outcome(int(self._process.stdout.readline()), out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return done

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def outside() -> dict[str, str]:
    """The environment without what huggingface_hub and sdops read."""
    return {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "SDOPS_"))}


@pytest.fixture(scope="session")
def zygotes(usual: dict[str, str]) -> Iterator[Callable[[dict[str, str]], Zygote]]:
    """The one that has imported huggingface_hub in the usual environment, or for any other one that has not."""
    running: dict[bool, Zygote] = {}

    def get(environment: dict[str, str]) -> Zygote:
        is_usual = environment.items() >= usual.items()
        if is_usual not in running:
            running[is_usual] = Zygote(usual if is_usual else {})
        return running[is_usual]

    yield get
    for one in running.values():
        one.close()


@pytest.fixture
def sdops(
    hub: HubServer, home: Path, tmp_path: Path, usual: dict[str, str], zygotes: Callable[[dict[str, str]], Zygote]
) -> Callable[..., Outcome]:
    """The command line as users start it, with the server for its Hub; variables of the environment as keywords.

    Whatever it says, it never says a token.
    """

    def call(*arguments: str, **environment: str) -> Outcome:
        given = {
            **usual,
            "SDOPS_CACHE": str(tmp_path / "sdops-cache"),
            "SDOPS_HUB_RETRIES": "2",
            "TMPDIR": str(tmp_path),
            **environment,
        }
        done = zygotes(given).run([str(word) for word in arguments], given, tmp_path)
        assert not re.search(r"hf_(?!hub)", done.out + done.err)
        assert "signature" not in done.out + done.err
        assert not list(tmp_path.glob("sdops-hub-*"))
        return done

    return call


@pytest.fixture(scope="session")
def model(small_checkpoint: Callable[..., Path]) -> bytes:
    return small_checkpoint("sd15").read_bytes()


@pytest.fixture(scope="session")
def tuned(small_checkpoint: Callable[..., Path]) -> bytes:
    return small_checkpoint("sd15", tuned=1).read_bytes()


def large(data: bytes, nbytes: int) -> bytes:
    """A safetensors file of one tensor with that many bytes that do not repeat."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + (data * (nbytes // len(data) + 1))[:nbytes]


__all__ = ["Blob", "Outcome", "large"]
