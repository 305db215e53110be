"""Casts between float dtypes at the speed of memory: bit patterns in, bit patterns out. No torch.

Every cast to a narrower dtype rounds once, to nearest with ties to even (or at random, see below), and saturates: a
value that would round beyond the largest finite one becomes that, and is counted. NaN stays NaN and infinity stays
infinity (in F8_E4M3, which has none, it becomes the largest value); both are counted. torch differs in one point: it
makes infinities of what is too large for fp16, bf16 and fp8 e5m2.

numpy converts float16 one element at a time. Here a block of float32 is rounded by the hardware's own addition: with
m = 1.5 * 2^(23 - mantissa) * 2^exponent(x), x + m - m is x rounded to `mantissa` bits, as x + m has no room for more.
Below the smallest normal number of the target the exponent is held, which makes the spacing that of its subnormals.
The result, times a power of two that aligns the exponent's biases, holds the narrow number's bits at a fixed place.

Random rounding: x lies between neighbours a < b of the target and becomes b with probability (x - a) / (b - a), so that
the mean is x (Croci et al., Stochastic rounding: implementation, error analysis and applications, 2022).
"""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdops.core import native
from sdops.core.fp8 import WRITABLE, fp8_values
from sdops.core.precision import FORMATS, Doubles, Raw, Singles
from sdops.core.spec import DTYPE_BITS, FP8
from sdops.core.tape import Op, Program

BLOCK = 1 << 17  # elements: buffers of 512 kB stay in the cache, the overhead of a call vanishes

Words = NDArray[np.int32]

# Narrow dtypes: mantissa bits, exponent of the smallest normal number, largest finite value, where rounding beyond
# begins (exclusive where the largest is even, so that the tie goes to it: fp8 e4m3), NaN, infinity.
_F16, _BF16 = FORMATS["F16"], FORMATS["BF16"]
_GRIDS: dict[str, tuple[int, int, float, float, int, int]] = {
    "F16": (10, -14, _F16.largest, 65520.0, 0x7E00, 0x7C00),
    "BF16": (7, -126, _BF16.largest, float(np.uint32(0x7F7F8000).view(np.float32)), 0x7FC0, 0x7F80),
    "F8_E4M3": (*WRITABLE["F8_E4M3"], float(np.nextafter(np.float32(464), np.float32(1e9))), 0x7F, 0x7E),
    "F8_E5M2": (*WRITABLE["F8_E5M2"], 61440.0, 0x7E, 0x7C),
}
WIDE = ("F32", "F64")
READABLE = frozenset({*_GRIDS, *WIDE, *FP8})
CASTABLE = frozenset({*_GRIDS, *WIDE})  # what can be written


class Counts(NamedTuple):
    """What a cast met: values clamped because they were too large, NaN, infinities."""

    overflow: int = 0
    nan: int = 0
    infinite: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sums."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def raw_dtype(dtype: str) -> np.dtype[np.unsignedinteger]:
    """numpy's dtype of the bit patterns of a float dtype."""
    return np.dtype(f"u{DTYPE_BITS[dtype] // 8}")


def cast(raw: Raw, source: str, out: Raw, target: str, noise: NDArray[np.uint32] | None = None) -> Counts:
    """Write `raw`, bit patterns of dtype `source`, into `out` as those of dtype `target`.

    Args:
        raw: One of READABLE.
        source: Its dtype.
        out: As many elements.
        target: One of CASTABLE.
        noise: Random words, one per element: round at random instead of to nearest.
    """
    if noise is None and (overflow := _compiled(raw, source, out, target)) is not None:
        return Counts(overflow)
    counts = Counts()
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(raw), BLOCK):
            part, result = raw[start : start + BLOCK], out[start : start + BLOCK]
            words = None if noise is None else noise[start : start + BLOCK]
            counts = counts.plus(_cast_block(part, source, result, target, words))
    return counts


def _compiled(raw: Raw, source: str, out: Raw, target: str) -> int | None:
    """Cast finite numbers in compiled code; None where there is none, or more than overflow to count."""
    if native.library() is None or not {source, target} <= set(native.DTYPES):
        return None
    overflow = _copy(source, target)([raw], out, (), 0)
    return overflow if overflow >= 0 else None


@cache
def _copy(source: str, target: str) -> native.NativeTape:
    """A tape (core/tape.c) that loads a number and stores it."""
    return native.NativeTape(Program([(Op.LOAD, 0, 0, 0, 0)], constants=(), result=0, draws=()), [source], target)


def _cast_block(raw: Raw, source: str, out: Raw, target: str, noise: NDArray[np.uint32] | None) -> Counts:
    if target == "F64":
        wide = out.view(np.float64)
        np.copyto(wide, raw.view(np.float64) if source == "F64" else singles_of(raw, source))
        return _count(wide)
    if source == "F64":
        return _from_doubles(raw.view(np.float64), out, target, noise)
    singles = singles_of(raw, source)
    if target == "F32":
        np.copyto(out, singles.view(np.uint32))
        return _count(singles)
    if noise is not None:
        return _from_doubles(singles.astype(np.float64), out, target, noise)
    return from_singles(singles, out, target)


def _count(values: NDArray[np.floating]) -> Counts:
    if np.isfinite(values).all():
        return Counts()
    return Counts(0, int(np.isnan(values).sum()), int(np.isinf(values).sum()))


class _Buffers(threading.local):
    """One thread's buffers for a block."""

    def __init__(self) -> None:
        self.singles = np.empty(BLOCK, np.int32)
        self.magic = np.empty(BLOCK, np.int32)
        self.rounded = np.empty(BLOCK, np.float32)
        self.signs = np.empty(BLOCK, np.uint16)


_buffers = _Buffers()


def singles_of(raw: Raw, dtype: str) -> Singles:
    """At most a BLOCK of values as float32, exactly; valid until this thread's next call. Not for F64."""
    if dtype == "F32":
        return raw.view(np.float32)
    words = _buffers.singles[: len(raw)]
    values: Singles = words.view(np.float32)
    if dtype.endswith("FNUZ"):
        np.copyto(values, fp8_values(dtype)[raw])
        return values
    np.copyto(words, raw.view(f"i{raw.itemsize}"))  # sign-extends
    if dtype == "BF16":
        np.left_shift(words, 16, out=words)
        return values
    mantissa, min_exponent = _GRIDS[dtype][:2]
    np.left_shift(words, 23 - mantissa, out=words)
    fields = (1 << (8 * raw.itemsize - 1)) - 1  # exponent and mantissa
    np.bitwise_and(words, (fields << (23 - mantissa)) - (1 << 31), out=words)
    np.multiply(values, np.float32(2.0 ** (126 + min_exponent)), out=values)
    if _largest_magnitude(values) > _bits(_GRIDS[dtype][2]):  # codes of infinity and NaN look like larger numbers
        np.copyto(values, raw.view(np.float16) if dtype == "F16" else fp8_values(dtype)[raw])
    return values


def from_singles(values: Singles, out: Raw, target: str) -> Counts:
    """At most a BLOCK of float32 rounded to a narrow dtype; `values` may be those of `singles_of`."""
    largest_value, beyond = _GRIDS[target][2:4]
    largest = _largest_magnitude(values)
    if largest < _bits(largest_value):
        _round(values, out, target)
        return Counts()
    magnitude = np.abs(values)
    nan, infinite = np.isnan(values), np.isinf(values)
    overflow = (magnitude >= np.float32(beyond)) & ~infinite
    values = np.where(nan, np.float32(0), np.clip(values, -largest_value, largest_value).astype(np.float32))
    _round(values, out, target)
    nan_code, infinity_code = _GRIDS[target][4:]
    sign = out.dtype.type(1 << (8 * out.itemsize - 1))
    out[infinite] = (out[infinite] & sign) | out.dtype.type(infinity_code)
    out[nan] = out.dtype.type(nan_code)
    return Counts(int(overflow.sum()), int(nan.sum()), int(infinite.sum()))


def _largest_magnitude(values: Singles) -> int:
    """Bit pattern of the largest magnitude, NaN above infinity."""
    if not len(values):
        return 0
    return max(int(values.view(np.int32).max()), int(values.view(np.uint32).max()) & 0x7FFFFFFF)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _round(values: Singles, out: Raw, target: str) -> None:
    """Bit patterns of finite values that are not too large."""
    if target == "BF16":
        _round_to_bf16(values.view(np.int32), out)
        return
    mantissa, min_exponent = _GRIDS[target][:2]
    magic, rounded = _buffers.magic[: len(values)], _buffers.rounded[: len(values)]
    np.bitwise_and(values.view(np.int32), np.int32(0x7F800000), out=magic)
    np.maximum(magic, _bits(2.0**min_exponent), out=magic)
    np.add(magic, ((23 - mantissa) << 23) + (1 << 22), out=magic)  # times 1.5 * 2^(23 - mantissa)
    np.add(values, magic.view(np.float32), out=rounded)
    np.subtract(rounded, magic.view(np.float32), out=rounded)
    np.multiply(rounded, np.float32(2.0 ** (-126 - min_exponent)), out=rounded)  # exponent fields: 0 to 15 or 31
    words = rounded.view(np.int32)
    np.right_shift(words, 23 - mantissa, out=words)
    np.copyto(out, words, casting="unsafe")
    # x + m - m loses the sign of what rounds to zero, so that it is taken from the values
    size = out.itemsize
    signs = _buffers.signs.view(out.dtype)[: len(values)]
    np.bitwise_and(values.view(out.dtype)[4 // size - 1 :: 4 // size], 1 << (8 * size - 1), out=signs)
    np.bitwise_or(out, signs, out=out)


def _round_to_bf16(words: Words, out: Raw) -> None:
    """(x + 0x7fff + lowest bit that stays) >> 16."""
    total = _buffers.magic[: len(words)]
    np.right_shift(words, 16, out=total)
    np.bitwise_and(total, 1, out=total)
    np.add(total, 0x7FFF, out=total)
    np.add(total, words, out=total)
    np.copyto(out, total.view(np.uint16)[1::2])


def _from_doubles(values: Doubles, out: Raw, target: str, noise: NDArray[np.uint32] | None) -> Counts:
    """Round to the target's grid in float64, where that is exact to do; then pack."""
    if target == "F32":
        with np.errstate(over="ignore"):
            singles = values.astype(np.float32)
        overflow = np.isinf(singles) & np.isfinite(values)
        np.copyto(singles, np.copysign(np.float32(FORMATS["F32"].largest), singles), where=overflow)
        np.copyto(out, singles.view(np.uint32))
        return Counts(int(overflow.sum())).plus(_count(values))
    mantissa, min_exponent, largest = _GRIDS[target][:3]
    limited = np.where(np.isinf(values), values, np.clip(values, -4 * largest, 4 * largest))
    exponent = (limited.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64)
    spacing = np.maximum(exponent, 2.0**min_exponent) * 2.0**-mantissa
    steps = limited / spacing
    rounded = np.rint(steps) if noise is None else np.floor(steps + (noise >> np.uint32(8)) * 2.0**-24)
    most = FORMATS["F32"].largest  # beyond what a bf16 may be, too
    finite = np.clip(rounded * spacing, -most, most)
    grid = np.copysign(np.where(np.isfinite(limited), finite, limited), limited)
    return from_singles(grid.astype(np.float32), out, target)
