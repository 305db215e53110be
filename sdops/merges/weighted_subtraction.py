"""Take a model out of a weighted sum again (un-merge)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"

# Smallest 1 - alpha beta: beyond it the rounding errors in a grow more than 10,000-fold.
LEAST_REMAINDER = 1e-4


def weighted_subtraction(a: Tensor, b: Tensor, *, alpha: float = 0.5, beta: float = 1.0) -> Tensor:
    """(a - alpha beta b) / (1 - alpha beta), computed as a + k (a - b), k = alpha beta / (1 - alpha beta).

    With beta = 1 the inverse of the weighted sum: if a = x + alpha (b - x), the result is x, as precisely as a was
    stored: errors of a grow by 1 / (1 - alpha beta).

    Source: ljleb/sd-mecha and s1dlx/meh, `weighted_subtraction`.

    Args:
        alpha: Share of b that is in a.
        beta: How much of that share to take out.

    Raises:
        UsageError: alpha beta is (nearly) 1: nothing of the model wanted is left in a.
    """
    removed = alpha * beta
    if abs(1 - removed) < LEAST_REMAINDER:
        raise UsageError(
            f"`alpha` times `beta` is {float(removed):g}: nothing else is left in the first model",
            hint="choose `alpha` and `beta` so that their product is not 1",
            alpha=alpha,
            beta=beta,
        )
    return a + (removed / (1 - removed)) * (a - b)
