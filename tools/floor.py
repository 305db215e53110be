"""The floor of a merge: read the inputs, write an output as large as the first, compute nothing.

    python tools/floor.py OUT A B [C ...] [--threads N] [--passes N] [--ahead]

Several threads, pieces of 1 MiB, buffers used again and again, a temporary file with fsync before it gets its name:
what any merge that streams must do at least. One thread writes at a time: the system allows no more, and one that
waits for it by spinning keeps another from reading. The output's bytes are those of A. With two passes all inputs are
read twice, as methods must that first measure and then combine. With `--ahead` the output gets its place on the disk at
once, and is sent there while the rest is read: what sdops does with large outputs.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

PIECE = 1 << 20
INTERVAL = 0.05  # seconds between two times that data are sent ahead


def copy(output: Path, inputs: list[Path], *, threads: int, passes: int, ahead: bool) -> None:
    """Stream all inputs `passes` times; write the first one's bytes in the last pass."""
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    size = os.fstat(sources[0]).st_size
    end = max(os.fstat(fd).st_size for fd in sources)
    temporary = output.with_name(output.name + ".floor.tmp")
    target = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if ahead:
            os.posix_fallocate(target, 0, size)
        else:
            os.ftruncate(target, size)
        with _sent(target) if ahead else nullcontext():
            for number in range(passes):
                _pass(sources, target if number == passes - 1 else None, size, end, threads)
        os.fsync(target)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
        for fd in (*sources, target):
            os.close(fd)


@contextmanager
def _sent(target: int) -> Iterator[None]:
    """Send what was written to the disk, again and again."""
    done = threading.Event()

    def send() -> None:
        while not done.wait(INTERVAL):
            os.fdatasync(target)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()


def _pass(sources: list[int], target: int | None, size: int, end: int, threads: int) -> None:
    offsets = iter(range(0, end, PIECE))
    locks = threading.Lock(), threading.Lock()
    workers = [threading.Thread(target=_work, args=(sources, target, size, offsets, *locks)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _work(
    sources: list[int],
    target: int | None,
    size: int,
    offsets: Iterator[int],
    counting: threading.Lock,
    writing: threading.Lock,
) -> None:
    # page-aligned: 16 bytes behind a page boundary, where malloc puts large blocks, copies are five times as slow
    buffers = [memoryview(mmap.mmap(-1, PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for _ in sources]
    while True:
        with counting:
            offset = next(offsets, None)
        if offset is None:
            return
        counts = [os.preadv(fd, [buffer], offset) for fd, buffer in zip(sources, buffers, strict=True)]
        if target is not None and offset < size:
            with writing:
                os.pwrite(target, buffers[0][: counts[0]], offset)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=min(len(os.sched_getaffinity(0)), 8))
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--ahead", action="store_true")
    options = parser.parse_args()
    copy(options.output, options.inputs, threads=options.threads, passes=options.passes, ahead=options.ahead)


if __name__ == "__main__":
    main()
