"""Add a difference only where it is opposite to what the model changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import maximum, zeros_of

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def add_strict_opposite(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a + 2 alpha s (b - c),   s = max(0, (c - a)(b - c)) / max(|a - c|, |b - c|)^2,  0 for 0/0.

    In terms of x = a - c and y = b - c: s = max(0, -x y) / max(|x|, |y|)^2 is 0 where the signs agree, 1 where
    y = -x.

    Source: ljleb/sd-mecha, `add_strict_opposite` mask.

    Args:
        alpha: How much of the difference to add.
    """
    x, y = a - c, b - c
    larger = maximum(abs(x), abs(y))
    larger = larger + zeros_of(larger)
    # Dividing each factor keeps tiny weights from vanishing when squared.
    share = maximum(-(x / larger) * (y / larger), 0)
    return a + 2 * alpha * share * y
