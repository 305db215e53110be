"""CRC-32 of data that is written in pieces, in any order, by several threads and processes.

The checksum of A followed by B follows from those of A and B and the length of B (zlib's crc32_combine): CRC-32 is a
remainder of polynomials over GF(2), and bytes that follow multiply it by a power of x.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from struct import Struct
from zlib import crc32

_POLYNOMIAL = 0xEDB88320  # bits reversed: x^0 is the highest
_ONE = 1 << 31
_RECORD = Struct("<QQQI")  # member, start, length, checksum


class PieceChecksums:
    """Checksums of pieces of numbered members, gathered from threads and forked processes.

    They go to the end of a nameless file, which works across a fork; the system keeps small appended writes apart.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the object
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_APPEND)

    def add(self, member: int, start: int, data: memoryview) -> None:
        """Take note of bytes `[start, start + len(data))` of a member."""
        self._file.write(_RECORD.pack(member, start, len(data), crc32(data)))

    def combined(self, sizes: Iterable[int]) -> list[int]:
        """The checksum of each member, given their sizes.

        Raises:
            RuntimeError: a part of a member is missing, or came twice.
        """
        self._file.seek(0)
        pieces: dict[int, list[tuple[int, int, int]]] = {}
        for member, start, length, checksum in _RECORD.iter_unpack(self._file.read()):
            pieces.setdefault(member, []).append((start, length, checksum))
        return [_join(sorted(pieces.get(member, [])), size) for member, size in enumerate(sizes)]

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _join(pieces: list[tuple[int, int, int]], size: int) -> int:
    total, end = 0, 0
    for start, length, checksum in pieces:
        if start != end:
            raise RuntimeError("a part of a tensor was not written, or twice")
        total = combine(total, checksum, length)
        end = start + length
    if end != size:
        raise RuntimeError("a part of a tensor was not written")
    return total


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of A + B from those of A and B; `length` is that of B in bytes."""
    return _product(_power(length), first) ^ second


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) modulo the polynomial of CRC-32."""
    if nbytes == 0:
        return _ONE
    if nbytes == 1:
        return _ONE >> 8
    half = _power(nbytes // 2)
    square = _product(half, half)
    return _product(square, _power(1)) if nbytes % 2 else square
