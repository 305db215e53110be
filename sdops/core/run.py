"""Copy a Source into a sink with several threads or processes. A Source that computes does its work here.

Memory is bounded by the pieces in flight. The bytes written do not depend on the number of workers: a piece's place
in the file and its value are functions of its position in the tensor alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from sdops import standin
from sdops.core.processes import can_fork, share
from sdops.core.sink import Sink
from sdops.core.source import Source, aligned

PIECE_BYTES = 1 << 20  # read at once from sources that only copy
JOB_BYTES = 4 << 20  # handed to a thread at once
FORK_BYTES = 256 << 20  # smaller outputs are not worth a process
WRITEBACK_BYTES = 64 << 20  # the disk shall always have work, and little of it when the last byte is written
GRACE_SECONDS = 1.0

Piece = tuple[str, int, int]  # key, first byte, one past the last byte
Progress = Callable[[int], None]


class Computed(Source, Protocol):
    """A Source that computes what it is read for and says in which portions."""

    def piece_bytes(self, key: str) -> int:
        """Read at most so many bytes at once; all reads but a tensor's last start at multiples of this."""

    def splits(self, key: str) -> bool:
        """Whether different threads may read pieces of the same tensor without repeating work."""


@runtime_checkable
class Forkable(Source, Protocol):
    """A Source that may be read in forked processes; what it counts there comes back as a tally.

    Attributes:
        forks: Whether it makes sense: much numpy, no torch, nothing that is shared between tensors. Compiled code
            needs no processes.
    """

    forks: bool

    def tally(self) -> Any:
        """What was counted in this process."""

    def add(self, tally: Any) -> None:
        """Add what was counted in another."""


def default_jobs() -> int:
    """Threads to use when nobody says: the cores this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, 8)


def run(source: Source, sink: Sink, *, jobs: int, progress: Progress | None = None) -> None:
    """Read every tensor of `sink` from `source` and write it.

    Args:
        source: Where tensors come from; must be readable from several threads.
        sink: An entered sink.
        jobs: Number of threads, or of processes for large outputs of a Source that forks.
        progress: Called with the number of bytes just written, from any thread.

    Raises:
        Whatever the first failing thread raised; the others are stopped. After a signal they get a second to stop: one
        that is deep in a decomposition is left behind, and finds the sink closed.
    """
    may_fork = can_fork() and not standin.is_streaming()  # every process would ask for every block
    if jobs > 1 and sink.nbytes >= FORK_BYTES and isinstance(source, Forkable) and source.forks and may_fork:
        _run_processes(source, sink, jobs, progress)
    else:
        _run_threads(source, sink, jobs, progress)


def _run_processes(source: Forkable, sink: Sink, jobs: int, progress: Progress | None) -> None:
    """Forked processes compute and write; a thread of this one keeps the disk busy."""
    state = _State(iter(()), sink, progress)
    buffers = [aligned(PIECE_BYTES)]

    def perform(job: list[Piece]) -> int:
        for piece in job:
            _copy(source, sink, piece, buffers)
        return sum(stop - start for _, start, stop in job)

    writer = threading.Thread(target=state.write_back, daemon=True)
    try:
        writer.start()
        for tally in share(list(_jobs(source, sink)), jobs, perform, source.tally, state.wrote):
            source.add(tally)
    finally:
        state.end()
        _join([writer], GRACE_SECONDS)
    if state.error is not None:
        raise state.error


def _run_threads(source: Source, sink: Sink, jobs: int, progress: Progress | None) -> None:
    state = _State(_jobs(source, sink), sink, progress)
    # one of them writes, which only one can at a time: the others keep the cores busy
    count = jobs + 1 if jobs > 1 else 1
    threads = [threading.Thread(target=_work, args=(source, state), daemon=True) for _ in range(count)]
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

    def __init__(self, jobs: Iterator[list[Piece]], sink: Sink, progress: Progress | None) -> None:
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
    buffers = [aligned(PIECE_BYTES)]
    try:
        while (job := state.next_job()) is not None:
            for piece in job:
                _copy(source, state.sink, piece, buffers, state)
                if state.stop.is_set():
                    return
    except BaseException as error:  # noqa: BLE001 - handed to the thread that called run
        state.fail(error)


def _copy(source: Source, sink: Sink, piece: Piece, buffers: list[memoryview], state: _State | None = None) -> None:
    """Read a piece in the portions that the source wants, and write them; `buffers` holds one, grown as needed."""
    key, start, stop = piece
    if _poured(source, sink, piece):
        if state is not None:
            state.wrote(stop - start)
        return
    step = piece_bytes(source, key)
    if len(buffers[0]) < min(step, stop - start):
        buffers[0] = aligned(min(step, stop - start))
    for position in range(start, stop, step):
        view = buffers[0][: min(step, stop - position)]
        source.read_into(key, position, view)
        sink.write(key, position, view)
        if state is not None:
            state.wrote(len(view))
            if state.stop.is_set():
                return


def _poured(source: Source, sink: Sink, piece: Piece) -> bool:
    """Whether the source could make the piece right where it belongs in a file."""
    pour: Callable[[str, int, int, int, int], bool] | None = getattr(source, "pour", None)
    place = sink.region(piece[0]) if pour else None
    if pour is None or place is None:
        return False
    own = os.dup(place[0])  # the sink may be closed meanwhile, and its number be that of another file
    try:
        return pour(*piece, own, place[1])
    finally:
        os.close(own)


def piece_bytes(source: Source, key: str) -> int:
    """In which portions a source wants to be read."""
    ask = getattr(source, "piece_bytes", None)
    return PIECE_BYTES if ask is None else ask(key)


def _jobs(source: Source, sink: Sink) -> Iterator[list[Piece]]:
    """Portions of about JOB_BYTES in the order of the output: many small tensors together, large ones cut."""
    splits = getattr(source, "splits", lambda _: True)
    job: list[Piece] = []
    size = 0
    for key, spec in sink.specs.items():
        step = piece_bytes(source, key)
        reach = max(step, JOB_BYTES // step * step)
        if spec.nbytes > reach and not splits(key):
            reach = spec.nbytes
        for start in range(0, spec.nbytes, reach):
            stop = min(start + reach, spec.nbytes)
            job.append((key, start, stop))
            size += stop - start
            if size >= JOB_BYTES:
                yield job
                job, size = [], 0
    if job:
        yield job
