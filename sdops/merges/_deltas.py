"""Changes from a base as matrices, for the methods that decompose them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdops.errors import UsageError


def deltas(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """x_i - base in float64: matrices (out, rest) of tensors with two or more dimensions, otherwise as they are.

    Raises:
        UsageError: there are no models.
    """
    if not models:
        raise UsageError("there is no model besides the base", hint="give the fine-tunes to merge after the base")
    changes = [x.double() - base.double() for x in models]
    return [change.flatten(1) for change in changes] if base.ndim > 1 else changes


def onto(base: Tensor, change: Tensor, alpha: float) -> Tensor:
    """base + alpha change, in the base's shape and dtype."""
    return (base.double() + alpha * change.reshape(base.shape)).to(base.dtype)
