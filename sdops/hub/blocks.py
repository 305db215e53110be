"""A file on the Hub read to its end in blocks, of which a few are in memory, and compared with its hash on the way.

Whoever goes through the file once needs few blocks. Threads that are at tensors far from each other, or read a tensor
twice, come back for blocks that were let go of: for them more are kept.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sdops.errors import HubError

BLOCK = 8 << 20
AHEAD = 1  # blocks that are asked for before they are wanted
KEPT = 4 + (os.cpu_count() or 1) // 2  # blocks in memory: threads of a run are at neighbouring places
MOST = 24  # blocks in memory, for others


class Blocks:
    """The blocks that are in memory or on their way.

    Args:
        name: Of the file, for messages.
        size: Of the file.
        ask: `ask(start, stop)` brings bytes; called in threads.
    """

    def __init__(self, name: str, size: int, ask: Callable[[int, int], memoryview]) -> None:
        self._name, self._size, self._ask = name, size, ask
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD + 2, thread_name_prefix="hub")
        self._here: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._kept = KEPT
        self._count = -(-size // BLOCK)
        self._states = [hashlib.sha256()]  # of the beginning, up to each block
        self._early: dict[int, memoryview] = {}  # came before the one that is to be hashed next
        self._spare = 2 + self._count // 64  # blocks to ask for only to hash them; -1: not followed any more

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            HubError: as `ask` does, or a block came twice and differs.
        """
        done = 0
        while done < len(buffer):
            index, inside = divmod(offset + done, BLOCK)
            portion = self._block(index)[inside : inside + len(buffer) - done]
            buffer[done : done + len(portion)] = portion
            done += len(portion)

    def check(self, sha256: str) -> None:
        """See that the file is what the Hub announces. If it was read here and there alone, it is not compared.

        Raises:
            HubError: it is not.
        """
        with self._hashing:
            while 0 < self._count - self._next - len(self._early) <= self._spare:  # so many have not come
                self._fill_gap()
            if self._next == self._count and self._states[-1].hexdigest() != sha256:
                raise damaged(self._name)

    def _block(self, index: int) -> memoryview:
        """A block, from memory or the Hub; the one behind it is asked for in advance."""
        with self._lock:
            for number in range(index, min(index + AHEAD + 1, self._count)):
                if number not in self._here:
                    self._here[number] = self._pool.submit(self._bring, number)
            self._here.move_to_end(index)
            while len(self._here) > self._kept:
                self._here.popitem(last=False)
            wanted = self._here[index]
        try:
            return wanted.result()
        except BaseException:
            with self._lock:
                self._here.pop(index, None)
            raise

    def _bring(self, number: int) -> memoryview:
        if (waiting := self._early.get(number)) is not None:
            return waiting
        data = self._ask_for(number)
        with self._hashing:
            if number < self._next:
                self._kept = min(self._kept + 1, MOST)
                self._compare(number, data)
            elif self._spare >= 0:
                self._early[number] = data
                self._follow()
        return data

    def _ask_for(self, number: int) -> memoryview:
        start = number * BLOCK
        return self._ask(start, min(start + BLOCK, self._size))

    @property
    def _next(self) -> int:
        """The block that is to be hashed next."""
        return len(self._states) - 1

    def _follow(self) -> None:
        """Hash what has come, in order; what others have overtaken is asked for, until there is too much of it."""
        while self._next in self._early:
            state = self._states[-1].copy()
            state.update(self._early.pop(self._next))
            self._states.append(state)
        if len(self._early) > self._kept:
            if self._kept < MOST:
                self._kept += 1
            elif self._spare > 0:
                self._fill_gap()
            else:
                self._early.clear()
                self._spare = -1

    def _fill_gap(self) -> None:
        self._spare -= 1
        self._early[self._next] = self._ask_for(self._next)
        self._follow()

    def _compare(self, number: int, data: memoryview) -> None:
        """A block that was let go of and came again is the same one."""
        state = self._states[number].copy()
        state.update(data)
        if state.digest() != self._states[number + 1].digest():
            raise damaged(self._name)


def damaged(name: str) -> HubError:
    """A streamed file that is not what the Hub announces."""
    return HubError(
        f"`{name}` arrived damaged: its hash is not the one that the Hub announces",
        hint="run the command again; without `--stream` a damaged file is fetched anew",
        reason="damaged",
    )
