"""Reads every tensor once, in pieces, and counts what should not be there. Bit patterns only, numpy only.

Magnitudes of floats order like their bit patterns without the sign, so one `and` and one `max` per piece tell
that nothing is wrong in it; the counting happens only where something is.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from sdops.core.source import Source, aligned
from sdops.report import Progress

_PIECE = 1 << 18  # bytes: larger temporaries would be fresh pages each time, and fall out of the cache
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How a float dtype spends its bits.

    Attributes:
        word: numpy's unsigned integer of the same width.
        infinity: Bits of the first magnitude that is no number.
        normal: Bits of the smallest normal magnitude.
        has_infinity: Whether `infinity` is one; otherwise it is NaN already.
        nan: For dtypes whose only NaN is minus zero: its bits.
    """

    word: str
    infinity: int
    normal: int
    has_infinity: bool = True
    nan: int | None = None


LAYOUTS = {
    "F64": Layout("<u8", 0x7FF0_0000_0000_0000, 0x0010_0000_0000_0000),
    "F32": Layout("<u4", 0x7F80_0000, 0x0080_0000),
    "F16": Layout("<u2", 0x7C00, 0x0400),
    "BF16": Layout("<u2", 0x7F80, 0x0080),
    "F8_E5M2": Layout("<u1", 0x7C, 0x04),
    "F8_E4M3": Layout("<u1", 0x7F, 0x08, has_infinity=False),
    "F8_E5M2FNUZ": Layout("<u1", 0x80, 0x04, has_infinity=False, nan=0x80),
    "F8_E4M3FNUZ": Layout("<u1", 0x80, 0x08, has_infinity=False, nan=0x80),
}


@dataclass(slots=True)
class Tally:
    """What was counted in one float tensor, or in a part of it.

    Attributes:
        nan: Elements that are not a number.
        inf: Infinite elements.
        subnormal: Elements so small that they have lost precision; counted in fp16 only.
        top: Bits of the largest finite magnitude; 0 if every element is zero.
    """

    nan: int = 0
    inf: int = 0
    subnormal: int = 0
    top: int = 0

    def add(self, other: Tally) -> None:
        """Count a further part of the tensor."""
        self.nan += other.nan
        self.inf += other.inf
        self.subnormal += other.subnormal
        self.top = max(self.top, other.top)


def scan(source: Source, progress: Progress) -> dict[str, Tally]:
    """Read all tensors; a Tally for each float tensor, by name.

    Raises:
        ChangedError: the file was cut short or replaced meanwhile.
    """
    tallies = {key: Tally() for key, spec in source.specs.items() if spec.dtype in LAYOUTS}
    pieces, lock = _pieces(source), Lock()
    total = sum(spec.nbytes for spec in source.specs.values())

    def work() -> None:
        buffer = aligned(_PIECE)
        while piece := take():
            key, start, length = piece
            source.read_into(key, start, buffer[:length])
            if key in tallies:
                found = count(np.frombuffer(buffer[:length], np.uint8), source.specs[key].dtype)
                with lock:
                    tallies[key].add(found)
            advance(length)

    def take() -> tuple[str, int, int] | None:
        with lock:
            return next(pieces, None)

    with progress(f"reading {source.name}", total) as advance:
        threads = min(_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            workers = [pool.submit(work) for _ in range(threads)]
            try:
                for worker in workers:
                    worker.result()
            finally:  # an error or Ctrl-C: the others find nothing left to do
                with lock:
                    pieces.close()
    return tallies


def _pieces(source: Source) -> Generator[tuple[str, int, int]]:
    for key, spec in source.specs.items():
        for start in range(0, spec.nbytes, _PIECE):
            yield key, start, min(_PIECE, spec.nbytes - start)


def count(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str) -> Tally:
    """Tally of the bytes of some elements of `dtype`."""
    layout = LAYOUTS[dtype]
    bits = data.view(layout.word)
    magnitude = bits & bits.dtype.type(~(1 << 8 * bits.itemsize - 1) & (1 << 8 * bits.itemsize) - 1)
    tally = Tally(top=int(magnitude.max()))
    if layout.nan is not None:
        tally.nan = int(np.count_nonzero(bits == layout.nan))
    if tally.top >= layout.infinity:
        odd = int(np.count_nonzero(magnitude >= layout.infinity))
        tally.inf = int(np.count_nonzero(magnitude == layout.infinity)) if layout.has_infinity else 0
        tally.nan += odd - tally.inf
        tally.top = int(magnitude[magnitude < layout.infinity].max(initial=0))
    if dtype == "F16":  # 0 wraps around to the largest word
        tally.subnormal = int(np.count_nonzero(magnitude - bits.dtype.type(1) < layout.normal - 1))
    return tally


def magnitude_value(bits: int, dtype: str) -> float:
    """The number that a magnitude's bits stand for."""
    layout = LAYOUTS[dtype]
    if dtype in ("F64", "F32", "F16"):
        return float(np.array(bits, layout.word).view(layout.word.replace("u", "f")))
    mantissa_bits = layout.normal.bit_length() - 1
    exponent, mantissa = bits >> mantissa_bits, bits & layout.normal - 1
    bias = {"BF16": 127, "F8_E5M2": 15, "F8_E4M3": 7, "F8_E5M2FNUZ": 16, "F8_E4M3FNUZ": 8}[dtype]
    significand = mantissa + (layout.normal if exponent else 0)
    return float(significand * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
