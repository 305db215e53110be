"""Combine the changes of two models by the root of their squares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdops.core.elementwise import copysign, power, sqrt
from sdops.merges._knobs import share

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

EXECUTION = "elementwise"

# A distance below this share of the norms, squared, is rounding of the float64 sums.
NEGLIGIBLE = 1e-14


def euclidean_add_difference(
    a: Tensor, b: Tensor, c: Tensor, *, gram: NDArray[np.float64], alpha: float = 0.5
) -> Tensor:
    """c + |l| copysign(sqrt((1 - alpha) u^2 + alpha v^2), l),   l = (1 - alpha) a + alpha b - c.

    u = (a - c) / |a - c| and v = (b - c) / |b - c| over the whole tensor. The root has norm 1, so that the change has
    the norm of the plain average l. If a or b equals c, the change is l.

    Source: s1dlx/meh, `euclidean_add_difference`.

    Args:
        alpha (0 to 1): Share of b.

    Raises:
        UsageError: alpha is outside [0, 1], where the root would be of a negative number.
    """
    alpha = share("alpha", alpha)
    x, y = a - c, b - c
    change = x + alpha * (y - x)
    x_norm, y_norm = _norm(gram, 1.0, 0.0), _norm(gram, 0.0, 1.0)
    if not (x_norm and y_norm):
        return c + change
    size = sqrt((1 - alpha) * power(x / x_norm, 2) + alpha * power(y / y_norm, 2))
    return c + _norm(gram, 1 - alpha, alpha) * copysign(size, change)


def _norm(gram: NDArray[np.float64], of_a: float, of_b: float) -> float:
    """|of_a (a - c) + of_b (b - c)| from the inner products (3, 3) of a, b, c."""
    weights = np.array([of_a, of_b, -of_a - of_b])
    square = float(weights @ gram @ weights)
    return square**0.5 if square > NEGLIGIBLE * float(weights**2 @ gram.diagonal()) else 0.0
