from __future__ import annotations

import json
import os
import re
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


@pytest.fixture(scope="module")
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


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """HF_HOME."""
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    outside = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "SDOPS_"))}
    command = [sys.executable, "-m", "tests.hub.zygote"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=outside, cwd=root
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def sdops(hub: HubServer, home: Path, tmp_path: Path, zygote: subprocess.Popen[str]) -> Callable[..., Outcome]:
    """The command line as users start it, with the server for its Hub; variables of the environment as keywords.

    Whatever it says, it never says a token.
    """

    def call(*arguments: str, **environment: str) -> Outcome:
        given = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "SDOPS_CACHE": str(tmp_path / "sdops-cache"),
            "SDOPS_HUB_RETRIES": "2",
            "TMPDIR": str(tmp_path),
            **environment,
        }
        outside = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "SDOPS_"))}
        out, err = tmp_path / ".out", tmp_path / ".err"
        wish = {
            "arguments": [str(word) for word in arguments],
            "environment": outside | given,
            "folder": str(tmp_path),
            "out": str(out),
            "err": str(err),
        }
        zygote.stdin.write(json.dumps(wish) + "\n")
        zygote.stdin.flush()
        done = Outcome(int(zygote.stdout.readline()), out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
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
