"""Add a difference where two models differ, average them where they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import maximum, zeros_of

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def similarity_add_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """(1 - s) (a + alpha (b - c)) + s ((1 - alpha/2) a + alpha/2 b),   s = beta (a b / max(|a|, |b|)^2 + 1) / 2.

    s = beta where a and b are 0. s is beta for equal weights, beta / 2 where one is 0, 0 for opposite weights.

    Source: s1dlx/meh, `similarity_add_difference`.

    Args:
        alpha: How much of the difference to add.
        beta: How much the similarity counts; 0 is add_difference.
    """
    larger = maximum(abs(a), abs(b))
    both_zero = zeros_of(larger)
    larger = larger + both_zero
    # Dividing each factor keeps tiny weights from vanishing when squared.
    agreement = (a / larger) * (b / larger) + both_zero
    similarity = beta * (agreement + 1) / 2
    return a + (1 - similarity) * alpha * (b - c) + similarity * (alpha / 2) * (b - a)
