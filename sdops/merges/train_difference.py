"""Add a difference as if the model had been trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import zeros_of

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def train_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a + 1.8 alpha s (b - c),   s = |b - a| / (|b - c| + |b - a|),  0 where the denominator is 0.

    Where a already is near b nothing is added; where a is far from b, nearly all of 1.8 times the difference.

    Source: hako-mikan/sd-webui-supermerger, "trainDifference"; the same as sd-mecha's `train_difference` mask.

    Args:
        alpha: How much of the difference to add.
    """
    difference = b - c
    distance = abs(b - a)
    denominator = abs(difference) + distance
    share = distance / (denominator + zeros_of(denominator))
    return a + 1.8 * alpha * share * difference
