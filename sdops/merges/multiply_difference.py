"""Geometric mean of the changes of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import copysign, geometric_mean
from sdops.merges._knobs import share

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def multiply_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """c + copysign(|a - c|^(1 - alpha) |b - c|^alpha, (1 - beta) a + beta b - c),   0^0 = 1.

    Source: s1dlx/meh, `multiply_difference`.

    Args:
        alpha (0 to 1): Share of b in the size of the change.
        beta: Share of b in the direction of the change.

    Raises:
        UsageError: alpha is outside [0, 1], where zero changes would become infinite.
    """
    alpha = share("alpha", alpha)
    x, y = a - c, b - c
    size = geometric_mean(abs(x), abs(y), alpha)
    return c + copysign(size, x + beta * (y - x))
