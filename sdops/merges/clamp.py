"""Limit a model to the range of other models."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from sdops.core.elementwise import lerp, maximum, minimum, where
from sdops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def clamp(*models: Tensor, stiffness: float = 0.0) -> Tensor:
    """min(max(a, low), high), a = the first model, low and high = elementwise extremes of the others.

    With stiffness s the range shrinks towards its middle: low moves by s to the largest bound that is not above the
    mean of the bounds, high to the smallest one that is not below it.

    Source: ljleb/sd-mecha, `clamp`.

    Args:
        stiffness: 0 is the full range of the bounds, 1 the narrowest.

    Raises:
        UsageError: there is no model to take bounds from.
    """
    if len(models) < 2:
        raise UsageError("`clamp` has no bounds", hint="give the model to limit and then one or more bounds")
    a, *bounds = models
    low, high = reduce(minimum, bounds), reduce(maximum, bounds)
    if stiffness:
        mean = reduce(add, bounds) / len(bounds)
        inner_low = reduce(maximum, [where(x <= mean, x, low) for x in bounds])
        inner_high = reduce(minimum, [where(x >= mean, x, high) for x in bounds])
        low, high = lerp(low, inner_low, stiffness), lerp(high, inner_high, stiffness)
    return where(a < low, low, where(a > high, high, a))
