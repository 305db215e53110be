"""How far one model's tensors are from another's: bytes first, numbers only where the bytes differ. No torch.

Both Sources are read in pieces, so memory is a few megabytes per worker. One worker reads a tensor from its first byte
to its last, so the sums do not depend on the number of workers. fp16, bf16 and fp32 go through compiled code where
there is some (compare.c), everything else through numpy.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core import native
from sdops.core.casting import CASTABLE, READABLE, cast, raw_dtype
from sdops.core.precision import FORMATS, Doubles, decode
from sdops.core.processes import can_fork, share
from sdops.core.run import FORK_BYTES
from sdops.core.source import Source, aligned
from sdops.core.spec import DTYPE_BITS, INTEGERS, Spec

PIECE = 1 << 17  # elements; two float64 arrays of this size and their products stay in the processor's cache
_PIECE_BYTES = PIECE * 8
_PLAIN = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_PLAIN |= {"BOOL": "u1", "C64": "<f4"}  # a complex number is two real ones

NUMBERS = frozenset({*FORMATS, *INTEGERS, "C64"})  # dtypes whose values can be compared; others are codes


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of equal length, whatever their dtypes.

    Attributes:
        name: What the result is filed under.
        a, key_a: The tensor that counts as the old one.
        b, key_b: The new one.
        codes: Compare the bytes only: they are not numbers (packed weights).
    """

    name: str
    a: Source
    key_a: str
    b: Source
    key_b: str
    codes: bool = False

    @property
    def specs(self) -> tuple[Spec, Spec]:
        """Dtype and shape of both."""
        return self.a.specs[self.key_a], self.b.specs[self.key_b]

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(slots=True)
class Measure:
    """What a comparison of tensors x (old) and y (new) found; sums in float64 over the finite elements.

    Attributes:
        elements: n, the number of elements.
        same_bytes: Whether dtype and all bytes agree; then the sums were not taken and are zero.
        changed: Elements with another value; of codes, bytes.
        square_a, square_b: sum x^2, sum y^2.
        square_change: sum (y - x)^2.
        product: sum x y.
        largest: max |y - x|.
        nonfinite: Elements that are NaN or infinite in either; they are left out of the sums.
        rounded: Whether one is the other, rounded to nearest in its narrower dtype: F16 of F32 and the like.
    """

    elements: int
    same_bytes: bool = False
    changed: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    square_change: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    rounded: bool = False

    @property
    def relative(self) -> float | None:
        """|y - x| / |x| in Euclidean norms; None for x = 0 and for codes, unless nothing changed."""
        if not self.square_a:
            return None if self.changed else 0.0
        return sqrt(self.square_change / self.square_a)

    @property
    def broken(self) -> bool:
        """Whether NaN or infinity came or went, and no number changed beside."""
        return bool(self.changed and self.nonfinite and not self.square_change)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between x and y; None if one of them is zero (or the sums were not taken)."""
        lengths = sqrt(self.square_a) * sqrt(self.square_b)
        return max(-1.0, min(1.0, self.product / lengths)) if lengths else None

    def add(self, other: Measure) -> None:
        """Count further elements, of this tensor or of another one."""
        self.elements += other.elements
        self.changed += other.changed
        self.square_a += other.square_a
        self.square_b += other.square_b
        self.square_change += other.square_change
        self.product += other.product
        self.largest = max(self.largest, other.largest)
        self.nonfinite += other.nonfinite


def compare(pairs: Sequence[Pair], *, jobs: int, progress: Callable[[int], None]) -> dict[str, Measure]:
    """Compare all pairs, by name.

    Args:
        pairs: What to compare.
        jobs: Threads, or processes where much is to be read.
        progress: Called with the number of bytes just read, from any thread.

    Raises:
        ChangedError: a file was cut short or replaced meanwhile.
    """
    measures: dict[str, Measure] = {}
    local = threading.local()

    def perform(pair: Pair) -> int:
        measures[pair.name] = measure(pair, local.__dict__.setdefault("buffers", _Buffers()))
        return pair.nbytes

    # Large ones first, dealt out in turn: every process gets about the same amount.
    tasks = sorted(pairs, key=lambda pair: -pair.nbytes)
    if jobs > 1 and sum(pair.nbytes for pair in pairs) >= FORK_BYTES and can_fork():
        for part in share(tasks, jobs, perform, lambda: measures, progress):
            measures.update(part)
    else:
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(perform, pair) for pair in tasks]:
                progress(done.result())
    return {pair.name: measures[pair.name] for pair in pairs}


def measure(pair: Pair, buffers: _Buffers | None = None) -> Measure:
    """Compare one pair of tensors.

    Returns:
        A Measure; of equal bytes only `elements` and `same_bytes` are set.
    """
    buffers = buffers or _Buffers()
    a, b = pair.specs
    if (pair.codes or a.dtype == b.dtype) and a.nbytes == b.nbytes:
        changed = _changed_bytes(pair, buffers, count=pair.codes)
        if not changed:
            return Measure(a.numel, same_bytes=True)
        if pair.codes:
            return Measure(a.numel, changed=changed)
    elif pair.codes:
        return Measure(a.numel, changed=a.nbytes)
    total, elements = Measure(0), a.nbytes * 8 // _bits(a)
    compiled = _compiled() if {a.dtype, b.dtype} <= set(native.DTYPES) else None
    rounded = a.dtype in READABLE and b.dtype in READABLE and DTYPE_BITS[a.dtype] != DTYPE_BITS[b.dtype]
    for first in range(0, elements, PIECE):
        count = min(PIECE, elements - first)
        views = [_portion(pair, side, first, count, buffers) for side in (0, 1)]
        rounded = rounded and _is_rounded(views, (a.dtype, b.dtype))
        if compiled is not None:
            total.add(_measure_compiled(compiled, views, (a.dtype, b.dtype), count))
        else:
            total.add(_measure_values(_values(views[0], a.dtype), _values(views[1], b.dtype)))
    total.elements, total.rounded = a.numel, rounded
    return total


class _Buffers:
    """One worker's memory: a piece of either tensor."""

    def __init__(self) -> None:
        self.sides = (aligned(_PIECE_BYTES), aligned(_PIECE_BYTES))


def _bits(spec: Spec) -> int:
    """Bits of what is compared as one number."""
    return 32 if spec.dtype == "C64" else DTYPE_BITS[spec.dtype]


def _read(pair: Pair, side: int, start: int, nbytes: int, buffers: _Buffers) -> memoryview:
    view = buffers.sides[side][:nbytes]
    source, key = (pair.a, pair.key_a) if side == 0 else (pair.b, pair.key_b)
    source.read_into(key, start, view)
    return view


def _changed_bytes(pair: Pair, buffers: _Buffers, *, count: bool) -> int:
    """Number of bytes that differ; without `count`, 1 as soon as one does."""
    changed, nbytes = 0, pair.specs[0].nbytes
    for start in range(0, nbytes, _PIECE_BYTES):
        size = min(_PIECE_BYTES, nbytes - start)
        x, y = (np.frombuffer(_read(pair, side, start, size, buffers), np.uint8) for side in (0, 1))
        whole = size // 8 * 8
        if np.array_equal(x[:whole].view(np.uint64), y[:whole].view(np.uint64)) and np.array_equal(
            x[whole:], y[whole:]
        ):
            continue
        if not count:
            return 1
        changed += int(np.count_nonzero(x != y))
    return changed


def _compiled() -> Any:
    """The compiled function, or None."""
    return getattr(native.library(), "sdops_compare", None)


def _measure_compiled(function: Any, views: list[memoryview], dtypes: tuple[str, str], count: int) -> Measure:
    """As `_measure_values`, of bit patterns."""
    sums, counts = (ctypes.c_double * 5)(), (ctypes.c_uint64 * 2)()
    sides = [
        value
        for view, dtype in zip(views, dtypes, strict=True)
        for value in (ctypes.c_void_p(np.frombuffer(view, np.uint8).ctypes.data), native.DTYPES.index(dtype))
    ]
    function(*sides, ctypes.c_size_t(count), sums, counts)
    return Measure(count, False, counts[0], sums[0], sums[1], sums[2], sums[3], sums[4], counts[1])


def _portion(pair: Pair, side: int, first: int, count: int, buffers: _Buffers) -> memoryview:
    """Elements `[first, first + count)` of one side, as they are."""
    width = _bits(pair.specs[side]) // 8
    return _read(pair, side, first * width, count * width, buffers)


def _values(raw: memoryview, dtype: str) -> Doubles:
    """Elements as float64."""
    if dtype in FORMATS:
        return decode(np.frombuffer(raw, FORMATS[dtype].raw), dtype)
    numbers: NDArray[Any] = np.frombuffer(raw, _PLAIN[dtype])
    return numbers.astype(np.float64)


def _is_rounded(views: Sequence[memoryview], dtypes: tuple[str, str]) -> bool:
    """Whether the elements of the narrower dtype are those of the wider one, rounded."""
    wide, narrow = sorted((0, 1), key=lambda side: -DTYPE_BITS[dtypes[side]])
    if dtypes[narrow] not in CASTABLE:
        return False
    stored = np.frombuffer(views[narrow], raw_dtype(dtypes[narrow]))
    made = np.empty_like(stored)
    cast(np.frombuffer(views[wide], raw_dtype(dtypes[wide])), dtypes[wide], made, dtypes[narrow])
    return np.array_equal(made, stored)


def _measure_values(x: Doubles, y: Doubles) -> Measure:
    """Of one piece; x and y are used up."""
    changed, odd = int(np.count_nonzero(x != y)), 0
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.all():
        odd = int(np.count_nonzero(~finite))
        changed -= int(np.count_nonzero(np.isnan(x) & np.isnan(y)))  # NaN differs from itself
        x[~finite] = y[~finite] = 0
    found = Measure(len(x), changed=changed, nonfinite=odd)
    found.square_a, found.square_b, found.product = _dot(x, x), _dot(y, y), _dot(x, y)
    y -= x
    found.square_change = _dot(y, y)
    found.largest = float(max(y.max(initial=0.0), -y.min(initial=0.0)))
    return found


def _dot(x: Doubles, y: Doubles) -> float:
    """sum x y in one thread, so in the same order every time."""
    return float(np.einsum("i,i->", x, y))
