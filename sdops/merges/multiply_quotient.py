"""Multiply a model by the quotient of two others (an experiment)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdops.core.elementwise import above, power, where

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def multiply_quotient(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Re(a (b / c)^alpha) with a complex power (principal branch); a where that is not finite, as for c = 0.

    The quotient is real: where it is negative the result is a |b/c|^alpha cos(pi alpha). Small c give large results;
    expect outliers.

    Source: ljleb/sd-mecha, `multiply_quotient`, without its mask, which lowers alpha where log|a/c| and log|b/c| are
    not opposite.

    Args:
        alpha: Exponent of the quotient.
    """
    quotient = b / c
    negative = above(-quotient, 0)  # 1 or 0
    turn = 1 - negative + negative * math.cos(math.pi * alpha)
    result = a * (turn * power(abs(quotient), alpha))
    return where((abs(result) < math.inf) & (abs(c) > 0), result, a)
