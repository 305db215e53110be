"""Geometric mean of two models (an experiment)."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

from sdops.core.elementwise import above, geometric_mean
from sdops.merges._knobs import share

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def geometric_sum(a: Tensor, b: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Re(a^(1 - alpha) b^alpha) with complex powers (principal branch), 0^0 = 1.

    A negative weight is |w| e^(i pi), so the result is |a|^(1 - alpha) |b|^alpha cos(pi t) where t adds up 1 - alpha
    if a < 0 and alpha if b < 0. Real powers, as in Chattiori-Model-Merger, give NaN for negative weights.

    Source: ljleb/sd-mecha, `geometric_sum`.

    Args:
        alpha (0 to 1): Share of b.

    Raises:
        UsageError: alpha is outside [0, 1], where zero weights would become infinite.
    """
    alpha = share("alpha", alpha)
    a_negative, b_negative = above(-a, 0), above(-b, 0)  # 1 or 0
    # cos 0, cos(pi (1 - alpha)) = -cos(pi alpha), cos(pi alpha) or cos pi
    cosine = 1 - a_negative - b_negative + cos(pi * alpha) * (b_negative - a_negative)
    return geometric_mean(abs(a), abs(b), alpha) * cosine
