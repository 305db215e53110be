"""sum_i c_i x_i, rounded once, in torch alone: what `linear_merge` computes, on any device.

Products and sums are kept in float64 as high + low with error-free transformations, rounded to odd, then once into the
result's dtype. The rare element for which twice float64 is too short is done again in rational arithmetic.

sdops has the same in numpy and C (`sdops/core/exact.py`), with the same bits. This package imports nothing of sdops, so
that it can be installed and loaded from the Hub alone; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["exact_sum", "round_once", "split_coefficient", "to_odd", "two_sum"]

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32)}
Coefficient = float | Fraction


def split_coefficient(coefficient: Coefficient) -> tuple[float, float] | None:
    """A number as the sum of two float32; None if it takes more. A float is rounded to float32 first."""
    if not isinstance(coefficient, Fraction):
        return _single(coefficient), 0.0
    high = _single(float(coefficient))
    low = _single(float(coefficient - Fraction(high)))
    return (high, low) if Fraction(high) + Fraction(low) == coefficient else None


def exact_sum(inputs: Sequence[Tensor], coefficients: Sequence[Coefficient], dtype: torch.dtype) -> tuple[Tensor, int]:
    """round(sum_i c_i x_i), rounded once to nearest, ties to even; what is too large is clamped.

    Args:
        inputs: Tensors of one shape: float16, bfloat16 or float32.
        coefficients: One per input; a float means the float32 next to it, a Fraction means itself.
        dtype: Of the result.

    Returns:
        The sums, and how many were clamped.

    Raises:
        ValueError: an input holds NaN or infinity.
    """
    for x in inputs:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("an input holds NaN or infinity")
    exact = [c if isinstance(c, Fraction) else Fraction(_single(c)) for c in coefficients]
    high, low, uncertain = _compensated(inputs, exact)
    odd = to_odd(high, low)
    flat = odd.reshape(-1)
    for index in uncertain.reshape(-1).nonzero()[:, 0].tolist():
        terms = (c * Fraction(float(x.reshape(-1)[index])) for x, c in zip(inputs, exact, strict=False))
        flat[index] = _fraction_to_odd(sum(terms, Fraction(0)))
    return round_once(odd, dtype)


def round_once(odd: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """float64 numbers that were rounded to odd, in a narrower dtype, correctly; and how many were clamped.

    torch goes from float64 to halves by way of float32 and rounds twice; rounding to odd on that way makes it once.
    """
    largest = LARGEST[dtype]
    if dtype != torch.float32:
        single = odd.float()
        back = single.double()
        bits = single.view(torch.int32) - (back.abs() > odd.abs()).int() | (back != odd).int()
        single = torch.where(torch.isfinite(single), bits.view(torch.float32), single)
        rounded = single.to(dtype)
    else:
        rounded = odd.float()
    clamped = torch.isinf(rounded)
    return rounded.clamp_(-largest, largest), int(clamped.sum())


def _compensated(inputs: Sequence[Tensor], coefficients: Sequence[Fraction]) -> tuple[Tensor, Tensor, Tensor]:
    """The sum as high + low, and where something was lost."""
    high = low = torch.zeros(())
    uncertain = torch.zeros_like(inputs[0], dtype=torch.bool)
    begun = False
    for x, coefficient in zip(inputs, coefficients, strict=False):
        wide = x.double()
        for part in _short_parts(coefficient):
            term = wide * part
            if not begun:
                high, low, begun = term, torch.zeros_like(term), True
                continue
            high, error = two_sum(high, term)
            low, rest = two_sum(low, error)
            uncertain |= rest != 0
    return high, low, uncertain


def _short_parts(coefficient: Fraction) -> list[float]:
    """float64 parts of at most 29 bits each: times a float32 they are exact."""
    parts: list[float] = []
    while coefficient:
        unit = Fraction(2) ** (_exponent(coefficient) - 28)
        part = int(coefficient / unit) * unit
        parts.append(float(part))
        coefficient -= part
    return parts or [0.0]


def _exponent(value: Fraction) -> int:
    """The largest e with 2^e <= |value|."""
    numerator, denominator = abs(value.numerator), value.denominator
    found = numerator.bit_length() - denominator.bit_length()
    return found if Fraction(2) ** found <= abs(value) else found - 1


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(high: Tensor, low: Tensor) -> Tensor:
    """float64 nearest to high + low toward zero, last bit set if anything was cut off."""
    total, error = two_sum(high, low)
    total = torch.where(low == 0, high, total)  # keeps the sign of zero
    inexact = error != 0
    against = inexact & ((error < 0) != (total < 0))
    bits = total.view(torch.int64) - against.long() | inexact.long()
    return bits.view(torch.float64)


def _fraction_to_odd(value: Fraction) -> float:
    """float64 toward zero, last bit set if anything was cut off."""
    nearest = torch.tensor(float(value), dtype=torch.float64)
    difference = value - Fraction(float(nearest))
    if difference == 0:
        return float(nearest)
    bits = nearest.view(torch.int64) - int((difference < 0) != (float(nearest) < 0)) | 1
    return float(bits.view(torch.float64))


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())
