"""A Source that several others read at the same time: the piece that was made last is kept for the next reader."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sdops.core.run import piece_bytes
from sdops.core.source import Source
from sdops.core.view import View

if TYPE_CHECKING:
    from sdops.core.chain import Link, Links


class Remembered(View):
    """A computed Source used by more than one step of a recipe.

    Threads work on pieces of a tensor one after the other, and ask all inputs for the same bytes: so each thread keeps
    the last few pieces that it read, and what two steps share is computed once. Without this a chain of n steps that
    each use the one before twice would compute the first 2^n times.

    Args:
        source: What is read.
    """

    KEPT = 2  # pieces per thread: an input that is read in other portions must not drive out the common one

    def __init__(self, source: Source) -> None:
        super().__init__(source, source.specs)
        self._local = threading.local()

    def piece_bytes(self, key: str) -> int:
        """As the source's."""
        return piece_bytes(self.source, key)

    def link(self, key: str, links: Links) -> Link | None:
        """As the source's, if it is made of others: a chain makes it once, too."""
        from sdops.core.chain import link

        made = link(self.source, key, links)
        return made if made.is_sum else None

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's."""
        kept: list[tuple[str, int, bytearray]] = self._local.__dict__.setdefault("kept", [])
        for name, first, data in kept:
            if name == key and first <= start and start + len(buffer) <= first + len(data):
                buffer[:] = memoryview(data)[start - first :][: len(buffer)]
                return
        self.source.read_into(key, start, buffer)
        data = kept.pop(0)[2] if len(kept) == self.KEPT else bytearray()
        if len(data) != len(buffer):
            data = bytearray(len(buffer))
        data[:] = buffer
        kept.append((key, start, data))
