"""Add a difference most where it points away from what the model already has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import zeros_of

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def add_opposite(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a + 2 alpha s (b - c),   s = |a - b| / (|a - b| + |a + b - 2 c|),  0 where the denominator is 0.

    In terms of x = a - c and y = b - c: s = |x - y| / (|x - y| + |x + y|) is 0 for equal changes, 1/2 where only one
    model changed, 1 for opposite changes.

    Source: ljleb/sd-mecha, `add_opposite` mask.

    Args:
        alpha: How much of the difference to add.
    """
    x, y = a - c, b - c
    apart = abs(x - y)
    denominator = apart + abs(x + y)
    share = apart / (denominator + zeros_of(denominator))
    return a + 2 * alpha * share * y
