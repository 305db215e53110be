"""Correctly rounded linear combinations: round(sum_i c_i * x_i), evaluated exactly, rounded once, ties to even.

Why care: a fine-tune differs from its base by a few units in the last place, so alpha * (b - a) lies on or beside a
rounding tie all the time. Anything inexact there is a coin toss, and the toss depends on chunk size and device.

Coefficients are dyadic fractions (see core.linear) and products of a coefficient with a value are exact in float64.
Two ways to add them up, chosen per piece by a bound on the values in it; both give the same bits:

  lattice      All products are multiples of 2**lattice and no partial sum reaches 2**(lattice + 53): plain float64
               addition is exact. This is the case for nearly all pieces of real half-precision checkpoints.
  compensated  Otherwise: error-free transformation (Knuth's TwoSum) into hi + lo, rounded to odd, so that the one
               rounding into the output format sees whether anything lies beyond float64's last bit
               (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008).

The last step packs float64 into half precision with integer shifts. Scaling by a power of two makes float64's exponent
field equal that of the target, so subnormal results need no special case.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import frexp, ldexp

import numpy as np

from sdops.core.precision import FORMATS, Doubles, Raw, decode, encode

PIECE = 1 << 17  # elements worked on at once: three float64 buffers of this size live in L3, call overhead vanishes

# The float32 that a shifted half makes is x * 2**-112: its exponent field is the half's own.
_DECODED_SCALE = {"F16": -112, "BF16": 0, "F32": 0, "F64": 0}
# float64 scaled by this has the exponent field of the target (bias 1023 -> 15 or 127).
_PACKED_SCALE = {"F16": -1008, "BF16": -896, "F32": 0, "F64": 0}


class NonFiniteError(ArithmeticError):
    """An input of a sum holds NaN or infinity; `index` says which one."""

    def __init__(self, index: int) -> None:
        super().__init__(f"input {index} holds NaN or infinity")
        self.index = index


class Scratch:
    """One thread's buffers, reused for every piece."""

    _local = threading.local()

    @classmethod
    def of_thread(cls) -> Scratch:
        """The calling thread's buffers, made at its first call."""
        if not hasattr(cls._local, "scratch"):
            cls._local.scratch = cls()
        scratch: Scratch = cls._local.scratch
        return scratch

    def __init__(self) -> None:
        self.words = np.empty(PIECE, np.int32)
        self.shorts = np.empty(PIECE, np.uint16)
        self.total = np.empty(PIECE, np.float64)
        self.term = np.empty(PIECE, np.float64)
        self.spare = np.empty(PIECE, np.float64)


class ExactSum:
    """The function (x_1, ..., x_n) -> round(sum_i c_i x_i) for fixed coefficients and dtypes.

    Args:
        coefficients: One dyadic fraction per input, none of them zero.
        dtypes: The inputs' dtypes (F16, BF16, F32, F64).
        out_dtype: The result's dtype.
    """

    def __init__(self, coefficients: Sequence[Fraction], dtypes: Sequence[str], out_dtype: str) -> None:
        self.coefficients = tuple(coefficients)
        self.dtypes = tuple(dtypes)
        self.out_dtype = out_dtype
        self.out_scale = _PACKED_SCALE[out_dtype]
        self.floats = [float(c) for c in self.coefficients]
        # 2**fraction_bits[i] is the denominator of c_i: products are multiples of lsb(x_i) * 2**-fraction_bits[i]
        self.fraction_bits = [c.denominator.bit_length() - 1 for c in self.coefficients]
        self.short_coefficients = all(Fraction(f) == c for f, c in zip(self.floats, coefficients, strict=True))

    def __call__(self, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> int:
        """Write the rounded sums of one piece into `out`; return how many overflowed and were clamped.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
        """
        bounds = [_bounds(raw, dtype, i) for i, (raw, dtype) in enumerate(zip(raws, self.dtypes, strict=True))]
        reach = sum(abs(c) * largest for c, (largest, _) in zip(self.floats, bounds, strict=True))
        lattice = min(lsb - bits for bits, (_, lsb) in zip(self.fraction_bits, bounds, strict=True))
        if not self._is_exact(reach, lattice):
            return self._compensated(raws, out, scratch)
        total = self._plain_sum(raws, scratch)
        if self.out_dtype in ("F32", "F64"):
            np.copyto(out.view(np.float32 if self.out_dtype == "F32" else np.float64), total, casting="unsafe")
        elif self._ties_impossible(bounds):
            _pack(total, self.out_dtype, out, scratch, round_half_up=True)
        else:
            _round_scaled(total, self.out_dtype, scratch)
            _pack(total, self.out_dtype, out, scratch, round_half_up=False)
        return 0

    def _is_exact(self, reach: float, lattice: int) -> bool:
        """Whether plain float64 sums are exact: 53 bits suffice, also in the scaled subnormal range."""
        fits = self.short_coefficients and reach < ldexp(1.0, lattice + 53)
        return fits and lattice + self.out_scale >= -1074 and reach < FORMATS[self.out_dtype].largest

    def _ties_impossible(self, bounds: Sequence[tuple[float, int]]) -> bool:
        """Whether no exact sum of the piece can lie halfway between two halves.

        With two fp16 inputs and c_1 + c_2 = 1 the sum is x_1 + c d, d = x_2 - x_1, c = odd / 2**q: its lowest
        set bit is 2**(v - q) where 2**v is d's. A tie of a half ends at 2**-25 or above, so |d| < 2**(q - 25)
        excludes it.
        """
        if self.out_dtype != "F16" or self.dtypes != ("F16", "F16") or sum(self.coefficients) != 1:
            return False
        difference = bounds[0][0] + bounds[1][0]
        return difference < ldexp(1.0, self.fraction_bits[1] - 25)

    def _plain_sum(self, raws: Sequence[Raw], scratch: Scratch) -> Doubles:
        """sum_i c_i x_i * 2**out_scale in float64."""
        size = len(raws[0])
        total, term = scratch.total[:size], scratch.term[:size]
        for i, (raw, dtype) in enumerate(zip(raws, self.dtypes, strict=True)):
            target = term if i else total
            _decode_scaled(raw, dtype, target, scratch)
            np.multiply(target, ldexp(self.floats[i], self.out_scale - _DECODED_SCALE[dtype]), out=target)
            if i:
                np.add(total, term, out=total)
        return total

    def _compensated(self, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> int:
        """Exact sum as hi + lo (+ rest), rounded to odd into float64, then once into the output dtype."""
        size = len(raws[0])
        hi, lo, uncertain = np.zeros(0), np.zeros(size), np.zeros(size, bool)
        for raw, dtype, coefficient in zip(raws, self.dtypes, self.coefficients, strict=True):
            value = scratch.spare[:size]
            _decode_scaled(raw, dtype, value, scratch)
            for part, x in product(_short_parts(coefficient), _short_values(value, dtype)):
                term = x * ldexp(part, -_DECODED_SCALE[dtype])
                if not hi.size:
                    hi = term
                    continue
                hi, error = _two_sum(hi, term)
                lo, rest = _two_sum(lo, error)
                uncertain |= rest != 0
        if self.out_dtype == "F64":
            out[:] = (hi + lo).view(np.uint64)
            return 0
        odd = _round_to_odd(hi, lo)
        self._settle(odd, np.flatnonzero(uncertain), raws)
        bits, overflow = encode(odd, self.out_dtype)
        out[:] = bits
        return overflow

    def _settle(self, odd: Doubles, indices: np.ndarray, raws: Sequence[Raw]) -> None:
        """Redo single elements whose sum needs more than twice float64's precision, in rational arithmetic."""
        for index in indices:
            exact = Fraction(0)
            for raw, dtype, coefficient in zip(raws, self.dtypes, self.coefficients, strict=True):
                exact += coefficient * Fraction(float(decode(raw[index : index + 1], dtype)[0]))
            odd[index] = _fraction_to_odd(exact)


def _bounds(raw: Raw, dtype: str, index: int) -> tuple[float, int]:
    """Largest magnitude in the piece, and an exponent e such that all values are multiples of 2**e."""
    target = FORMATS[dtype]
    if not len(raw):
        return 0.0, target.lsb_exponent
    signed = raw.view(np.dtype(target.raw).str.replace("u", "i"))
    largest = max(int(signed.max()), int(raw.max()) & (target.sign - 1), 0)
    if largest >= target.infinity:
        raise NonFiniteError(index)
    exponent = (largest >> target.mantissa) or 1
    bound = ldexp(1.0, target.min_exponent + exponent)  # the next power of two above
    if dtype == "F16":
        return bound, target.lsb_exponent
    # smallest non-zero magnitude: zero wraps to the top when 1 is subtracted
    smallest = int(((raw & target.raw(target.sign - 1)) - target.raw(1)).min()) + 1
    exponent = min((smallest >> target.mantissa) or 1, exponent)
    return bound, target.lsb_exponent + exponent - 1


def _decode_scaled(raw: Raw, dtype: str, out: Doubles, scratch: Scratch) -> None:
    """Values times 2**_DECODED_SCALE[dtype], exactly, into `out`."""
    if dtype in ("F32", "F64"):
        np.copyto(out, raw.view(np.float32 if dtype == "F32" else np.float64))
        return
    words = scratch.words[: len(raw)]
    np.copyto(words, raw.view(np.int16))  # sign-extends
    if dtype == "F16":
        np.left_shift(words, 13, out=words)
        np.bitwise_and(words, np.int32(-0x70000001), out=words)  # sign, 5 exponent bits, mantissa
    else:
        np.left_shift(words, 16, out=words)
    np.copyto(out, words.view(np.float32))


def _pack(total: Doubles, dtype: str, out: Raw, scratch: Scratch, *, round_half_up: bool) -> None:
    """Bit patterns of scaled values: the high word holds sign, exponent and 20 mantissa bits.

    With `round_half_up` the magnitude is rounded here (right where exact ties cannot occur), otherwise it is exact.
    """
    shift = 20 - FORMATS[dtype].mantissa
    words, shorts = scratch.words[: len(total)], scratch.shorts[: len(total)]
    np.copyto(words, total.view(np.int32)[1::2])
    if round_half_up:
        np.add(words, 1 << (shift - 1), out=words)
    np.right_shift(words, shift, out=words)
    np.copyto(out, words, casting="unsafe")
    np.right_shift(words, 16 - shift, out=words)
    np.copyto(shorts, words, casting="unsafe")
    np.bitwise_and(shorts, 0x8000, out=shorts)
    np.bitwise_or(out, shorts, out=out)


def _round_scaled(total: Doubles, dtype: str, scratch: Scratch) -> None:
    """As precision.round_to_format, on scaled values, in place and without new memory."""
    target = FORMATS[dtype]
    magic, rounded = scratch.term[: len(total)], scratch.spare[: len(total)]
    np.bitwise_and(total.view(np.uint64), np.uint64(0x7FF0000000000000), out=magic.view(np.uint64))
    np.maximum(magic, ldexp(1.0, target.min_exponent + _PACKED_SCALE[dtype]), out=magic)
    np.multiply(magic, 1.5 * 2.0 ** (52 - target.mantissa), out=magic)
    np.add(total, magic, out=rounded)
    np.subtract(rounded, magic, out=rounded)
    np.copysign(rounded, total, out=total)


def _two_sum(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _round_to_odd(hi: Doubles, lo: Doubles) -> Doubles:
    """float64 nearest to hi + lo toward zero, last bit set if anything was cut off."""
    s, error = _two_sum(hi, lo)
    s = np.where(lo == 0, hi, s)  # keeps the sign of zero
    inexact = error != 0
    bits = s.view(np.int64)
    bits -= inexact & ((error < 0) != (s < 0))
    bits |= inexact
    return s


def _short_parts(coefficient: Fraction) -> list[float]:
    """Split into float64 parts of at most 26 bits: their products with 27-bit values are exact."""
    parts: list[float] = []
    while coefficient:
        _, exponent = frexp(float(coefficient))
        unit = Fraction(2) ** (exponent - 26)
        part = int(coefficient / unit) * unit  # toward zero, so that parts share the sign
        parts.append(float(part))
        coefficient -= part
    return parts


def _short_values(value: Doubles, dtype: str) -> list[Doubles]:
    """The values, or for float64 two halves of at most 27 bits that add up to them."""
    if dtype != "F64":
        return [value]
    high = (value.view(np.uint64) & np.uint64(~((1 << 26) - 1) & (1 << 64) - 1)).view(np.float64)
    return [high, value - high]


def _fraction_to_odd(exact: Fraction) -> float:
    """float64 toward zero, last bit set if inexact."""
    nearest = float(exact)
    difference = exact - Fraction(nearest)
    if difference == 0:
        return nearest
    bits = np.float64(nearest).view(np.int64)
    if (difference < 0) != (nearest < 0):
        bits -= 1
    return float((bits | 1).view(np.float64))
