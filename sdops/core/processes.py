"""Share tasks among forked processes.

numpy and torch let go of Python's lock for every operation and take it again, and a thread that finds it taken sleeps:
with operations of 20 microseconds two threads are hardly faster than one. Processes do not get in each other's way, and
a fork costs milliseconds and little memory. What they compute runs on one thread each: the threads of torch and of a
BLAS library do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sdops.errors import SdopsError

if TYPE_CHECKING:  # copies need no processes, and the import takes as long as the rest of a small copy
    from multiprocessing.connection import Connection

Task = TypeVar("Task")
WAKE_SECONDS = 0.2
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def can_fork() -> bool:
    """Whether forked processes can do the work of threads: on Linux."""
    return sys.platform == "linux"


def share(
    tasks: Sequence[Task],
    count: int,
    perform: Callable[[Task], int],
    tally: Callable[[], Any],
    progress: Callable[[int], None],
) -> list[Any]:
    """Perform all tasks in `count` processes; the i-th takes every count-th task, beginning with the i-th.

    Args:
        tasks: What is to be done.
        count: Number of processes.
        perform: Does one task and returns how many bytes it wrote; called in a forked process.
        tally: Called there after the last task; what it returns must be picklable.
        progress: Called here with the bytes of each finished task.

    Returns:
        What the `tally` of each process returned.

    Raises:
        SdopsError: as `perform` raised it, or a process was killed. The other processes are killed then, as they
            are when this one is interrupted; when this one is killed, they end at their next task.
    """
    from multiprocessing.connection import Pipe

    pipes: list[Connection] = []
    children: list[int] = []
    try:
        with _signals_later():
            for index in range(count):
                receiver, sender = Pipe(duplex=False)
                pipes.append(receiver)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # our other threads hold no lock that is needed
                    child = os.fork()
                if child == 0:
                    _child(tasks[index::count], perform, tally, sender, pipes)
                children.append(child)
                sender.close()
        return _collect(pipes, progress)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)  # those that have ended are not reaped yet and do not mind
        for child in children:
            os.waitpid(child, 0)
        for pipe in pipes:
            pipe.close()


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold signals back: an exception that a handler raises while Python forks is printed and lost."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    met: list[int] = []
    handlers = {number: signal.signal(number, lambda found, _: met.append(found)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if met:
            signal.raise_signal(met[0])


def _child(
    tasks: Sequence[Task],
    perform: Callable[[Task], int],
    tally: Callable[[], Any],
    sender: Connection,
    pipes: Sequence[Connection],
) -> NoReturn:
    """Work, report, and leave without any of the parent's clean-up."""
    try:
        signal.signal(SIGNALS[0], signal.SIG_IGN)  # the parent decides
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)
        for pipe in pipes:
            pipe.close()  # so that writing fails once the parent is gone
        for task in tasks:
            sender.send(perform(task))
        sender.send(("done", tally()))
    except BrokenPipeError:
        pass
    except BaseException as error:  # noqa: BLE001 - raised again in the parent
        sender.send(("failed", _picklable(error)))
    finally:
        os._exit(0)


def _picklable(error: BaseException) -> BaseException:
    from multiprocessing.reduction import ForkingPickler

    try:
        ForkingPickler.dumps(error)
    except Exception:  # noqa: BLE001 - whatever keeps it from being sent
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _collect(pipes: Sequence[Connection], progress: Callable[[int], None]) -> list[Any]:
    """Listen until every process has told its tally."""
    from multiprocessing.connection import Connection, wait

    tallies: dict[int, Any] = {}
    open_pipes = {id(pipe): index for index, pipe in enumerate(pipes)}
    while open_pipes:
        # not for ever: a signal may reach another thread, and is seen by this one only when it wakes
        for pipe in wait([pipe for pipe in pipes if id(pipe) in open_pipes], timeout=WAKE_SECONDS):
            if not isinstance(pipe, Connection):
                continue
            try:
                message = pipe.recv()
            except EOFError:
                raise SdopsError(
                    "a worker process was killed, perhaps for lack of memory",
                    hint="`--jobs 1` works in one process and takes the least memory",
                ) from None
            if isinstance(message, int):
                progress(message)
                continue
            kind, content = message
            if kind == "failed":
                raise content
            tallies[open_pipes.pop(id(pipe))] = content
    return [tallies[index] for index in range(len(pipes))]
