"""Learn the coefficients of a linear merge method by calling it with symbols instead of tensors. No torch, no numpy.

A method such as `a + alpha * (b - a)` uses only `+ - * /`, so calling it with `Symbol`s yields the coefficient of every
input as an exact fraction. core.exact then evaluates the combination without any rounding but the last.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdops.errors import UsageError


def to_single(number: float | Fraction) -> Fraction:
    """The float32 nearest to a number, as a fraction.

    Raises:
        UsageError: the number is beyond float32's range.
    """
    try:
        return Fraction(struct.unpack("<f", struct.pack("<f", float(number)))[0])
    except OverflowError:
        raise UsageError(f"a weight of {float(number):g} is too large", hint="float32 ends at 3.4e38") from None


@dataclass(frozen=True, slots=True)
class Symbol:
    """sum_i c_i x_i: a linear combination of the inputs, with exact coefficients.

    Numbers are rounded to float32 when they enter, once: this is what "alpha" means in a linear merge, on every device.
    """

    terms: Mapping[int, Fraction]

    def __add__(self, other: Symbol | int) -> Symbol:
        if not isinstance(other, Symbol):  # sum() starts from 0
            return self if other == 0 else NotImplemented
        keys = self.terms.keys() | other.terms.keys()
        return Symbol({k: self.terms.get(k, Fraction(0)) + other.terms.get(k, Fraction(0)) for k in keys})

    __radd__ = __add__

    def __sub__(self, other: Symbol) -> Symbol:
        return self + (-other)

    def __neg__(self) -> Symbol:
        return Symbol({k: -c for k, c in self.terms.items()})

    def __mul__(self, number: float) -> Symbol:
        factor = to_single(number)
        return Symbol({k: c * factor for k, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> Symbol:
        divisor = to_single(number)
        return Symbol({k: c / divisor for k, c in self.terms.items()})


def coefficients(method: Callable[..., Any], count: int, knobs: Mapping[str, Any]) -> tuple[Fraction, ...]:
    """One dyadic coefficient per input of a linear method.

    Each is the method's exact coefficient rounded once to float32, except that the first model's takes what is missing
    to the exact sum: weights that add up to 1 still do, so merge(a, ..., a) = a.
    """
    result = method(*(Symbol({i: Fraction(1)}) for i in range(count)), **knobs)
    exact = [result.terms.get(i, Fraction(0)) for i in range(count)]
    rest = [to_single(c) for c in exact[1:]]
    total = sum(exact, Fraction(0))
    if total.denominator & (total.denominator - 1):  # not a dyadic fraction
        total = to_single(total)
    return (total - sum(rest, Fraction(0)), *rest)
