"""Values of half, bfloat16, single and double tensors as numpy sees them: decode, encode, and what each can hold.

numpy has no bfloat16 and converts float16 one element at a time, so both go through integer shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]  # a tensor's bytes viewed as unsigned integers of its width
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary floating point format.

    Attributes:
        raw: numpy dtype of the bit patterns.
        signed: The same width with sign.
        mantissa: explicit mantissa bits.
        min_exponent: exponent of the smallest normal number; the smallest subnormal is 2**(min_exponent - mantissa).
        largest: largest finite value.
        infinity: bit pattern of +inf; larger patterns (sign removed) are NaN.
    """

    raw: type[np.unsignedinteger[Any]]
    signed: type[np.signedinteger[Any]]
    mantissa: int
    min_exponent: int
    largest: float
    infinity: int

    @property
    def lsb_exponent(self) -> int:
        """Every finite value is a multiple of 2**lsb_exponent."""
        return self.min_exponent - self.mantissa

    @property
    def sign(self) -> int:
        """Bit pattern of the sign bit."""
        return 1 << (8 * np.dtype(self.raw).itemsize - 1)


FORMATS: dict[str, FloatFormat] = {
    "F16": FloatFormat(np.uint16, np.int16, 10, -14, 65504.0, 0x7C00),
    "BF16": FloatFormat(np.uint16, np.int16, 7, -126, 2.0**127 * (2 - 2.0**-7), 0x7F80),
    "F32": FloatFormat(np.uint32, np.int32, 23, -126, 2.0**127 * (2 - 2.0**-23), 0x7F800000),
    "F64": FloatFormat(np.uint64, np.int64, 52, -1022, 2.0**1023 * (2 - 2.0**-52), 0x7FF0000000000000),
}


def decode(raw: Raw, dtype: str) -> Doubles:
    """Bit patterns -> exact float64 values."""
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float64)
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(np.float32 if dtype == "F32" else np.float64).astype(np.float64)


def round_to_format(values: Doubles, dtype: str) -> Doubles:
    """Nearest value of the format, ties to even, as float64. The exponent range is not limited above.

    Adding and subtracting 1.5 * 2**(52 - mantissa) * 2**exponent(value) makes the hardware round to the
    format's spacing in one correct rounding; below the smallest normal the spacing stays constant.
    """
    target = FORMATS[dtype]
    exponent = (values.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64)
    np.maximum(exponent, 2.0**target.min_exponent, out=exponent)
    exponent *= 1.5 * 2.0 ** (52 - target.mantissa)
    rounded: Doubles = values + exponent
    rounded -= exponent
    return rounded


def encode(values: Doubles, dtype: str) -> tuple[Raw, int]:
    """Round to the format (nearest, ties to even), clamp to its largest value, return bit patterns and overflow count.

    `values` must be finite. An overflow is a value that would round to infinity.
    """
    target = FORMATS[dtype]
    if dtype == "F64":
        return values.view(np.uint64), 0
    if dtype == "F32":
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float32)
        overflow = int(np.count_nonzero(np.isinf(rounded)))
        if overflow:
            np.clip(rounded, -target.largest, target.largest, out=rounded)
        return rounded.view(np.uint32), overflow
    exact = round_to_format(values, dtype)
    over = np.abs(exact) > target.largest
    overflow = int(np.count_nonzero(over))
    if overflow:
        np.clip(exact, -target.largest, target.largest, out=exact)
    np.copysign(exact, values, out=exact)  # (v + m) - m loses the sign of a result that rounds to zero
    if dtype == "BF16":
        return (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), overflow
    return exact.astype(np.float16).view(np.uint16), overflow


def largest_bits(raw: Raw, dtype: str) -> int:
    """Bit pattern of the largest magnitude; from `infinity` on, something is infinite or NaN."""
    if not len(raw):
        return 0
    target = FORMATS[dtype]
    # as signed numbers the positive ones are the largest, as unsigned numbers the negative ones
    return max(int(raw.view(target.signed).max()), int(raw.max()) & (target.sign - 1))


def count_nonfinite(raw: Raw, dtype: str) -> tuple[int, int]:
    """Number of NaN and of infinite elements."""
    target = FORMATS[dtype]
    magnitude = raw & target.raw(target.sign - 1)
    infinite = int(np.count_nonzero(magnitude == target.infinity))
    return int(np.count_nonzero(magnitude > target.infinity)), infinite
