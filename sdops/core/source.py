"""A lazy checkpoint: specs and metadata from headers alone, tensor bytes on demand. No torch.

Everything that has tensors is a Source: a file, a folder, a view of another Source, a merge that has not
run yet. Verbs compose Sources and hand the last one to a sink.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from sdops.core.spec import Spec


class Source(Protocol):
    """What every lazy checkpoint offers.

    Attributes:
        name: How the user calls it, for messages (usually the file's name).
        specs: Tensor name -> Spec, in the order in which the tensors lie in the file.
        metadata: Text that came along with the tensors.
    """

    name: str
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes `[start, start + len(buffer))`.

        Bytes are those of the contiguous, little-endian tensor. Safe to call from several threads.

        Raises:
            ChangedError: the file was cut short or replaced since it was opened.
        """

    def close(self) -> None:
        """Release file handles."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie, one after the other, for compiled code that reads the file itself.

    Attributes:
        file: The open file's descriptor.
        position: Of the first byte.
        check: Raises ChangedError if the file is not as it was when it was opened.
    """

    file: int
    position: int
    check: Callable[[], None]


def place(source: Source, key: str) -> Place | None:
    """Where a source that is a file on this disk has a tensor; None for all others."""
    ask = getattr(source, "place", None)
    found: Place | None = None if ask is None else ask(key)
    return found


def splits(source: Source, key: str) -> bool:
    """Whether threads may share the tensor; sources that compute say so themselves, all others can be shared."""
    ask = getattr(source, "splits", None)
    return ask is None or bool(ask(key))


def aligned(nbytes: int) -> memoryview:
    """A buffer that begins at a page boundary.

    malloc puts large blocks 16 bytes behind one, where copies from page-aligned file offsets take five times as long on
    some processors (AMD Zen 3).
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}  # not shared after a fork
    return memoryview(mmap.mmap(-1, max(nbytes, 1), **private))[:nbytes]


def read(source: Source, key: str) -> bytearray:
    """The whole tensor's bytes."""
    data = bytearray(source.specs[key].nbytes)
    source.read_into(key, 0, memoryview(data))
    return data
