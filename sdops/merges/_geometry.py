"""Inner products, angles and weights that the methods of class "gram" share. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sdops.errors import UsageError
from sdops.merges._knobs import per_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Gram = NDArray[np.float64]  # inner products (N, N)
    Coefficients = NDArray[np.float64]  # of a linear combination (N)

# A squared length below this share of the terms that it was computed from is rounding of the float64 sums.
NEGLIGIBLE = 1e-14

# Below this sine of the angle, the weights of slerp and lerp agree to 12 digits.
PARALLEL = 1e-6

# Cosine beyond which two directions count as opposite: the great circle through them is not well defined.
OPPOSITE = -0.9995


def delta_gram(gram: Gram) -> Gram:
    """Inner products (N, N) of x_i - base from those of base, x_1 .. x_N, (N + 1, N + 1)."""
    deltas = gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]
    rounding = NEGLIGIBLE * (gram.diagonal()[1:] + gram[0, 0])
    real = deltas.diagonal() > rounding
    return np.where(real[:, None] & real[None, :], deltas, 0.0)


def onto_base(coefficients: Coefficients) -> Coefficients:
    """Coefficients (N + 1) of base + sum_i c_i (x_i - base) from c (N)."""
    return np.append(1 - coefficients.sum(), coefficients)


def normalized(weights: tuple[float, ...], count: int) -> Coefficients:
    """The weights divided by their sum (count).

    Raises:
        UsageError: the number of weights is not the number of models, or they sum to zero.
    """
    values = per_model(weights, count)
    total = sum(values)
    if abs(total) < 1e-12:
        raise UsageError(f"the weights {values} sum to zero", hint="change a weight", weights=values)
    return np.array(values, np.float64) / total


def length(coefficients: Coefficients, gram: Gram) -> float:
    """|sum_i c_i x_i|."""
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))


def arc_weights(aa: float, ab: float, bb: float, alpha: float) -> tuple[float, float]:
    """Weights of a and b in slerp from their inner products.

    sin((1 - alpha) t) / sin t and sin(alpha t) / sin t for the angle t between them; 1 - alpha and alpha if they
    are parallel, opposite, or one of them is zero. The sine comes from aa bb - ab^2, not from the arc cosine,
    which loses half of the digits of a small angle.
    """
    scale = math.sqrt(aa) * math.sqrt(bb)
    if scale == 0:
        return 1 - alpha, alpha
    cosine = ab / scale
    sine = math.sqrt(max(0.0, (1 - cosine) * (1 + cosine)))
    if sine < PARALLEL or cosine < OPPOSITE:
        return 1 - alpha, alpha
    angle = math.atan2(sine, cosine)
    return math.sin((1 - alpha) * angle) / sine, math.sin(alpha * angle) / sine
