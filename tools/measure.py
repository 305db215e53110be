"""Run a command and say what it cost: time of the wall and of the processor, and memory.

Measured by the kernel for the process and the children it waited for (wait4). `peak_mb` is the most that the process
itself had resident, pages of mapped files included; `anonymous_mb` is what it and its worker processes really took
together, read every few milliseconds from /proc, so that very short peaks are missed. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.004  # seconds between two looks at the memory


@dataclass(frozen=True, slots=True)
class Cost:
    """One run. Seconds and megabytes (10^6 bytes); `code` is the exit code, `error` the last line of its talk."""

    code: int
    wall: float
    user: float
    system: float
    peak_mb: float
    anonymous_mb: float
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, rounded to what they are worth."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, limit_mb: float = float("inf")
) -> Cost:
    """Run a command to its end; one that takes more than `limit_mb` of anonymous memory is killed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    anonymous, talk, error = 0.0, b"", ""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        talk = (talk + (process.stderr.read() or b""))[-4000:]
        if pid:
            break
        family = [process.pid, *_children(process.pid)]
        anonymous = max(anonymous, sum(map(_anonymous_mb, family)))
        if anonymous > limit_mb:
            error = f"killed: it took more than {limit_mb:,.0f} MB"
            process.send_signal(signal.SIGKILL)
        time.sleep(INTERVAL)
    wall = time.perf_counter() - start
    process.returncode = code = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if code and not error:
        error = talk.decode(errors="replace").strip().rpartition("\n")[2]
    return Cost(code, wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, anonymous, error)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _anonymous_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it just ended
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024 / 1e6
