"""Correctly rounded linear combinations: round(sum_i c_i * x_i), evaluated exactly, rounded once, ties to even.

Why care: a fine-tune differs from its base by a few units in the last place, so alpha * (b - a) lies on or beside a
rounding tie all the time. Anything inexact there is a coin toss, and the toss depends on chunk size and device.

Coefficients are dyadic fractions (see core.linear); products of a coefficient with a value are exact in float64, or
split into parts that are. How a piece is added up depends on bounds on the values in it; all ways give the same bits:

  single        All products are multiples of 2**lattice and no partial sum reaches 2**(lattice + 24): plain float32
                addition is exact. Such are averages of two fp16 models.
  double        The same with 53 bits and float64: nearly all pieces of real fp16 checkpoints. Ties need care only
                where they can occur at all.
  double, then  Plain float64 addition with a known bound on its error. Elements whose rounding that error could change
  compensated   are added up again with error-free transformations (Knuth's TwoSum) into hi + lo, rounded to odd so
                that the one rounding into the output format sees whether anything lies beyond float64's last bit
                (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008).

Where core.native has compiled code for the dtypes, that does the work instead, with the same bits: `double` where it is
exact, `compensated` elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import frexp, ldexp

import numpy as np

from sdops.core import native
from sdops.core.packing import (
    PACKED_SCALE,
    PIECE,
    WIDENED_SCALE,
    Indices,
    Scratch,
    near_single_ties,
    near_ties,
    pack_doubles,
    pack_singles,
    settle_ties,
    widen,
    widen_to_double,
)
from sdops.core.precision import FORMATS, Doubles, Raw, decode, encode, largest_bits

__all__ = ["PIECE", "ExactSum", "NonFiniteError", "Scratch"]

SHORT_BITS = 29  # of a coefficient: its product with a value of at most 24 bits is exact in float64


class NonFiniteError(ArithmeticError):
    """An input of a sum holds NaN or infinity; `index` says which one."""

    def __init__(self, index: int) -> None:
        super().__init__(f"input {index} holds NaN or infinity")
        self.index = index


class ExactSum:
    """The function (x_1, ..., x_n) -> round(sum_i c_i x_i) for fixed coefficients and dtypes.

    Args:
        coefficients: One dyadic fraction per input, none of them zero. Of no inputs the sum is 0.
        dtypes: The inputs' dtypes (F16, BF16, F32, F64).
        out_dtype: The result's dtype.
    """

    def __init__(self, coefficients: Sequence[Fraction], dtypes: Sequence[str], out_dtype: str) -> None:
        self.coefficients = tuple(coefficients)
        self.dtypes = tuple(dtypes)
        self.out_dtype = out_dtype
        self.out_scale = PACKED_SCALE[out_dtype]
        self.floats = [float(c) for c in self.coefficients]
        # 2**fraction_bits[i] is the denominator of c_i: products are multiples of lsb(x_i) * 2**-fraction_bits[i]
        self.fraction_bits = [c.denominator.bit_length() - 1 for c in self.coefficients]
        self.short_coefficients = all(Fraction(f) == c for f, c in zip(self.floats, coefficients, strict=True))
        # for numpy: coefficients times what scaled values lack to the result's scale, unless that is too small
        self.factors = [
            ldexp(f, self.out_scale - WIDENED_SCALE[dtype]) for f, dtype in zip(self.floats, dtypes, strict=True)
        ]
        self.scalable = all(abs(factor) >= 2.0**-1022 for factor in self.factors)
        self.affine_pair = len(self.dtypes) == 2 and sum(self.coefficients) == 1
        # equal inputs give themselves; with a negative coefficient not so for -0, whose sum is +0
        positive = all(c > 0 for c in self.coefficients)
        self.average = positive and sum(self.coefficients) == 1 and set(self.dtypes) == {out_dtype}
        self.all_halves = out_dtype == "F16" and all(dtype == "F16" for dtype in dtypes)
        terms = [(i, part) for i, c in enumerate(self.coefficients) for part in short_parts(c, SHORT_BITS)]
        self.native = native.make_sum(terms, self.dtypes, out_dtype)

    def __call__(self, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> int:
        """Write the rounded sums of one piece into `out`; return how many overflowed and were clamped.

        Raises:
            NonFiniteError: an input holds NaN or infinity.
        """
        if not raws:  # all coefficients were zero
            out[:] = 0
            return 0
        if self.average and _all_equal(raws):
            raws = raws[:1]  # the usual case for the VAE of a fine-tune
        bounds = [_bounds(raw, dtype, i) for i, (raw, dtype) in enumerate(zip(raws, self.dtypes, strict=False))]
        if len(raws) < len(self.dtypes):
            out[:] = raws[0]
            return 0
        reach = sum(abs(c) * largest for c, (largest, _) in zip(self.floats, bounds, strict=True))
        lattice = min(lsb - bits for bits, (_, lsb) in zip(self.fraction_bits, bounds, strict=True))
        if self.native is not None:
            return self._natively(self.native, raws, out, scratch, exact=reach < ldexp(1.0, lattice + 53))
        if self.out_dtype == "F64" or not self.scalable or reach >= FORMATS[self.out_dtype].largest:
            return self._compensated(raws, out, scratch)
        if self.all_halves and reach < ldexp(1.0, lattice + 24) and lattice + WIDENED_SCALE["F16"] >= -149:
            self._single(raws, out, scratch)
            return 0
        exact = self.short_coefficients and reach < ldexp(1.0, lattice + 53) and lattice + self.out_scale >= -1074
        # n products and n - 1 additions, each off by at most 2**-53 of the reach, and as much again for coefficients
        error = 0.0 if exact else (3 * len(raws) + 1) * ldexp(reach, -53)
        total = self._double(raws, scratch)
        if self.out_dtype == "F32":
            np.copyto(out.view(np.float32), total, casting="unsafe")
            suspects = near_single_ties(total, error) if error else None
        else:
            suspects = self._pack(total, out, error, bounds, scratch)
        if suspects is not None and len(suspects):
            self._again(suspects, raws, out, scratch)
        if error and len(zeros := self._doubtful_zeros(total, error, raws, out)):
            self._again(zeros, raws, out, scratch)
        return 0

    def _natively(
        self, compiled: native.NativeSum, raws: Sequence[Raw], out: Raw, scratch: Scratch, *, exact: bool
    ) -> int:
        """Let compiled code do it, but for what needs more than twice float64's precision."""
        overflow, uncertain = compiled(raws, out, scratch.words.view(np.uint32), exact=exact)
        if len(uncertain) and overflow:  # some may be both: count again
            return self._compensated(raws, out, scratch)
        return overflow + (self._again(uncertain.astype(np.intp), raws, out, scratch) if len(uncertain) else 0)

    def _doubtful_zeros(self, total: Doubles, error: float, raws: Sequence[Raw], out: Raw) -> Indices:
        """Where a sum that rounds to zero could have the other sign, or none; not where all terms are zero."""
        zeros = np.flatnonzero((out << out.dtype.type(1)) == 0)
        least = ldexp(error, self.out_scale) + 4 * len(raws) * ldexp(1.0, -1074)  # scaled sums may underflow
        zeros = zeros[np.abs(total[zeros]) <= least]
        some = np.zeros(len(zeros), bool)
        for raw in raws:
            some |= (raw[zeros] << raw.dtype.type(1)) != 0
        return zeros[some]

    def _pack(
        self, total: Doubles, out: Raw, error: float, bounds: Sequence[tuple[float, int]], scratch: Scratch
    ) -> Indices | None:
        """Round scaled sums to halves; indices of those that `error` could have changed."""
        settled = not error and self._ties_impossible(bounds)
        pack_doubles(total, self.out_dtype, out, scratch, keep_words=not settled)
        if error:
            return near_ties(total, self.out_dtype, error, scratch)
        if not settled:
            settle_ties(total, self.out_dtype, out, scratch)
        return None

    def _ties_impossible(self, bounds: Sequence[tuple[float, int]]) -> bool:
        """Whether no exact sum of the piece can lie halfway between two halves.

        With two fp16 inputs and c_1 + c_2 = 1 the sum is x_1 + c d, d = x_2 - x_1, c = odd / 2**q: its lowest
        set bit is 2**(v - q) where 2**v is d's. A tie of a half ends at 2**-25 or above, so |d| < 2**(q - 25)
        excludes it.
        """
        if not (self.all_halves and self.affine_pair):
            return False
        difference = bounds[0][0] + bounds[1][0]
        return difference < ldexp(1.0, self.fraction_bits[1] - 25)

    def _single(self, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> None:
        """fp16 sums whose every step is exact in float32."""
        size = len(raws[0])
        total, term = (buffer[:size] for buffer in (scratch.total.view(np.int32), scratch.words))
        for i, (raw, coefficient) in enumerate(zip(raws, self.floats, strict=True)):
            values = widen(raw, "F16", term if i else total)
            if coefficient != 1:
                np.multiply(values, np.float32(coefficient), out=values)
            if i:
                np.add(total.view(np.float32), values, out=total.view(np.float32))
        pack_singles(total, out, scratch)

    def _double(self, raws: Sequence[Raw], scratch: Scratch) -> Doubles:
        """sum_i c_i x_i * 2**out_scale in float64."""
        size = len(raws[0])
        total, term = scratch.total[:size], scratch.term[:size]
        for i, (raw, dtype) in enumerate(zip(raws, self.dtypes, strict=True)):
            target = term if i else total
            widen_to_double(raw, dtype, target, scratch)
            np.multiply(target, self.factors[i], out=target)
            if i:
                np.add(total, term, out=total)
        return total

    def _again(self, indices: Indices, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> int:
        """Sum single elements with compensation; return how many overflowed."""
        picked = np.empty(len(indices), out.dtype)
        overflow = self._compensated([raw[indices] for raw in raws], picked, scratch)
        out[indices] = picked
        return overflow

    def _compensated(self, raws: Sequence[Raw], out: Raw, scratch: Scratch) -> int:
        """Exact sum as hi + lo (+ rest), rounded to odd into float64, then once into the output dtype."""
        size = len(raws[0])
        hi, lo, uncertain = np.zeros(0), np.zeros(size), np.zeros(size, bool)
        for raw, dtype, coefficient in zip(raws, self.dtypes, self.coefficients, strict=True):
            value = np.empty(size)
            widen_to_double(raw, dtype, value, scratch)
            for part, x in product(short_parts(coefficient, 26), _short_values(value, dtype)):
                term = x * ldexp(part, -WIDENED_SCALE[dtype])
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


def _all_equal(raws: Sequence[Raw]) -> bool:
    """Whether all inputs have the same bits; looks at a few before it looks at all."""
    first = raws[0]
    return all(np.array_equal(first[:16], raw[:16]) and np.array_equal(first, raw) for raw in raws[1:])


def _bounds(raw: Raw, dtype: str, index: int) -> tuple[float, int]:
    """Largest magnitude in the piece, and an exponent e such that all values are multiples of 2**e."""
    target = FORMATS[dtype]
    if not len(raw):
        return 0.0, target.lsb_exponent
    measured = native.bounds(raw, dtype)
    largest = measured[0] if measured else largest_bits(raw, dtype)
    if largest >= target.infinity:
        raise NonFiniteError(index)
    exponent = (largest >> target.mantissa) or 1
    bound = ldexp(largest % (1 << target.mantissa) + (1 << target.mantissa), target.lsb_exponent + exponent - 1)
    if dtype == "F16":
        return bound, target.lsb_exponent
    smallest = measured[1] if measured else _smallest_bits(raw, dtype)
    exponent = min((smallest >> target.mantissa) or 1, exponent)
    return bound, target.lsb_exponent + exponent - 1


def _smallest_bits(raw: Raw, dtype: str) -> int:
    """Bit pattern of the smallest non-zero magnitude: zero wraps to the top when 1 is subtracted."""
    target = FORMATS[dtype]
    return int(((raw & target.raw(target.sign - 1)) - target.raw(1)).min()) + 1


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


def short_parts(coefficient: Fraction, bits: int) -> list[float]:
    """Split into float64 parts of at most so many bits: their products with (53 - bits)-bit values are exact."""
    parts: list[float] = []
    while coefficient:
        _, exponent = frexp(float(coefficient))
        unit = Fraction(2) ** (exponent - bits)
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
