"""Runs of the installed command line, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PATIENCE = 60.0  # seconds until a hanging run fails its test


@dataclass
class Outcome:
    """How a run ended; `code` is what a shell would show."""

    code: int
    out: str
    err: str


def start(*arguments: str | Path, prefix: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """`sdops merge` with these arguments, in the background; `prefix` is a command that runs commands."""
    command = [*prefix, sys.executable, "-m", "sdops", "merge", *map(str, arguments)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**streams, **options})


def end(child: subprocess.Popen[str]) -> Outcome:
    """Wait for a run."""
    try:
        out, err = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
    return Outcome(child.returncode if child.returncode >= 0 else 128 - child.returncode, out, err)


def merge(*arguments: str | Path, **options: Any) -> Outcome:
    """`sdops merge` from start to end."""
    return end(start(*arguments, **options))


def leftovers(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(".tmp"))


def wait_until(true: Callable[[], Any], child: subprocess.Popen[str]) -> None:
    """Poll until something is so, or the run is over and it will never be."""
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert child.poll() is None, f"ended too early: {child.communicate()}"
        assert time.monotonic() < give_up
        time.sleep(0.0005)


def stop_while_writing(child: subprocess.Popen[str], folder: Path, *, written: int = 1) -> Path:
    """Freeze a run once its temporary file holds something, long before its last byte; returns that file."""
    wait_until(lambda: any(path.stat().st_blocks * 512 >= written for path in leftovers(folder)), child)
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    (temporary,) = leftovers(folder)
    return temporary


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    save_file(dict(tensors), path)
    return path


def sparse(path: Path, elements: int, keys: int = 4) -> Path:
    """An fp16 file full of zeros that takes no room on the disk."""
    nbytes = elements * 2 // keys
    header = {
        f"w{i}": {"dtype": "F16", "shape": [nbytes // 2], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(keys)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + keys * nbytes)
    return path
