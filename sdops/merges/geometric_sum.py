"""Geometric mean of two models (an experiment)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdops.merges._knobs import share
from sdops.merges._masks import negatives_of

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
    turn = (1 - alpha) * negatives_of(a) + alpha * negatives_of(b)
    return a.abs() ** (1 - alpha) * b.abs() ** alpha * torch.cos(math.pi * turn)
