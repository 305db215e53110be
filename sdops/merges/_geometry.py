"""Inner products, angles and weights that the methods of class "gram" share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._knobs import per_model

# A squared length below this share of the terms that it was computed from is rounding of the float64 sums.
NEGLIGIBLE = 1e-14

# Below this sine of the angle, the weights of slerp and lerp agree to 12 digits.
PARALLEL = 1e-6

# Cosine beyond which two directions count as opposite: the great circle through them is not well defined.
OPPOSITE = -0.9995


def delta_gram(gram: Tensor) -> Tensor:
    """Inner products (N, N) of x_i - base from those of base, x_1 .. x_N, (N + 1, N + 1)."""
    deltas = gram[1:, 1:] - gram[1:, :1] - gram[:1, 1:] + gram[0, 0]
    rounding = NEGLIGIBLE * (gram.diagonal()[1:] + gram[0, 0])
    real = deltas.diagonal() > rounding
    return torch.where(real[:, None] & real[None, :], deltas, 0.0)


def onto_base(coefficients: Tensor) -> Tensor:
    """Coefficients (N + 1) of base + sum_i c_i (x_i - base) from c (N)."""
    return torch.cat([1 - coefficients.sum(0, keepdim=True), coefficients])


def normalized(weights: tuple[float, ...], count: int) -> Tensor:
    """The weights divided by their sum, float64 (count).

    Raises:
        UsageError: the number of weights is not the number of models, or they sum to zero.
    """
    values = per_model(weights, count)
    total = sum(values)
    if abs(total) < 1e-12:
        raise UsageError(f"the weights {values} sum to zero", hint="change a weight", weights=values)
    return torch.tensor(values, dtype=torch.float64) / total


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
