"""Copy a Source into a sink with several threads. If the Source computes its tensors, this is where the work happens.

Memory is bounded by the pieces in flight. The bytes written do not depend on the number of threads: a piece's place
in the file and its value are functions of its position in the tensor alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from sdops.core.sink import SafetensorsSink
from sdops.core.source import Source, aligned

PIECE_BYTES = 1 << 20  # read at once from sources that only copy
JOB_BYTES = 4 << 20  # handed to a thread at once
WRITEBACK_BYTES = 512 << 20
GRACE_SECONDS = 1.0

Piece = tuple[str, int, int]  # key, first byte, one past the last byte
Progress = Callable[[int], None]


class Computed(Source, Protocol):
    """A Source that computes what it is read for and says in which portions."""

    def piece_bytes(self, key: str) -> int:
        """Read at most so many bytes at once; all reads but a tensor's last start at multiples of this."""

    def splits(self, key: str) -> bool:
        """Whether different threads may read pieces of the same tensor without repeating work."""


def default_jobs() -> int:
    """Threads to use when nobody says: the cores this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, 8)


def run(source: Source, sink: SafetensorsSink, *, jobs: int, progress: Progress | None = None) -> None:
    """Read every tensor of `sink` from `source` and write it.

    Args:
        source: Where tensors come from; must be readable from several threads.
        sink: An entered sink.
        jobs: Number of threads.
        progress: Called with the number of bytes just written, from any thread.

    Raises:
        Whatever the first failing thread raised; the others are stopped. After a signal they get a second to stop: one
        that is deep in a decomposition is left behind, and finds the sink closed.
    """
    state = _State(_jobs(source, sink), sink, progress)
    threads = [threading.Thread(target=_work, args=(source, state), daemon=True) for _ in range(jobs)]
    threads.append(threading.Thread(target=state.write_back, daemon=True))
    patience = float("inf")
    try:
        for thread in threads:
            thread.start()
        for thread in threads[:-1]:
            thread.join()
    except BaseException:
        patience = GRACE_SECONDS
        raise
    finally:
        state.end()
        _join([thread for thread in threads if thread.ident is not None], patience)
    if state.error is not None:
        raise state.error


def _join(threads: list[threading.Thread], patience: float) -> None:
    """Wait for all threads, together no longer than so many seconds."""
    until = time.monotonic() + patience
    for thread in threads:
        thread.join(min(max(until - time.monotonic(), 0), threading.TIMEOUT_MAX))


class _State:
    """What the threads of one run share."""

    def __init__(self, jobs: Iterator[list[Piece]], sink: SafetensorsSink, progress: Progress | None) -> None:
        self.jobs = jobs
        self.sink = sink
        self.progress = progress
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.behind = threading.Event()  # enough was written to bother the disk with
        self._unsynced = 0

    def next_job(self) -> list[Piece] | None:
        with self.lock:
            return None if self.stop.is_set() else next(self.jobs, None)

    def end(self) -> None:
        """Let every thread stop as soon as it can."""
        self.stop.set()
        self.behind.set()

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error
        self.stop.set()

    def wrote(self, nbytes: int) -> None:
        self._unsynced += nbytes  # not exact between threads, and need not be
        if self._unsynced >= WRITEBACK_BYTES:
            self._unsynced = 0
            self.behind.set()
        if self.progress is not None:
            self.progress(nbytes)

    def write_back(self) -> None:
        """Keep the disk busy while the others compute, so that the final fsync has little left to do."""
        try:
            while self.behind.wait() and not self.stop.is_set():
                self.behind.clear()
                self.sink.start_writeback()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that called run
            self.fail(error)


def _work(source: Source, state: _State) -> None:
    buffer = aligned(PIECE_BYTES)
    try:
        while (job := state.next_job()) is not None:
            for key, start, stop in job:
                if state.stop.is_set():
                    return
                step = piece_bytes(source, key)
                if len(buffer) < min(step, stop - start):
                    buffer = aligned(min(step, stop - start))
                for position in range(start, stop, step):
                    view = buffer[: min(step, stop - position)]
                    source.read_into(key, position, view)
                    state.sink.write(key, position, view)
                    state.wrote(len(view))
                    if state.stop.is_set():
                        return
    except BaseException as error:  # noqa: BLE001 - handed to the thread that called run
        state.fail(error)


def piece_bytes(source: Source, key: str) -> int:
    """In which portions a source wants to be read."""
    ask = getattr(source, "piece_bytes", None)
    return PIECE_BYTES if ask is None else ask(key)


def _jobs(source: Source, sink: SafetensorsSink) -> Iterator[list[Piece]]:
    """Portions of about JOB_BYTES in the order of the output: many small tensors together, large ones cut."""
    splits = getattr(source, "splits", lambda _: True)
    job: list[Piece] = []
    size = 0
    for key, spec in sink.specs.items():
        step = piece_bytes(source, key)
        reach = max(step, JOB_BYTES // step * step) if splits(key) else max(spec.nbytes, 1)
        for start in range(0, spec.nbytes, reach):
            stop = min(start + reach, spec.nbytes)
            job.append((key, start, stop))
            size += stop - start
            if size >= JOB_BYTES:
                yield job
                job, size = [], 0
    if job:
        yield job
