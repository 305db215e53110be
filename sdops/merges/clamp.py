"""Limit a model to the range of other models."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._masks import where

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
    a, *others = models
    bounds = torch.stack(others)  # (N - 1, ...)
    low, high = bounds.amin(dim=0), bounds.amax(dim=0)
    if stiffness:
        mean = bounds.mean(dim=0)
        inner_low = where(bounds <= mean, bounds, low.expand_as(bounds)).amax(dim=0)
        inner_high = where(bounds >= mean, bounds, high.expand_as(bounds)).amin(dim=0)
        low, high = torch.lerp(low, inner_low, stiffness), torch.lerp(high, inner_high, stiffness)
    return torch.minimum(torch.maximum(a, low), high)
