"""Two weighted sums, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def sum_twice(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, beta: float = 0.25) -> Tensor:
    """(1 - beta) ((1 - alpha) a + alpha b) + beta c.

    Source: hako-mikan/sd-webui-supermerger, "sum Twice".

    Args:
        alpha: Share of b in the first sum.
        beta: Share of c in the second.
    """
    ab = a + alpha * (b - a)
    return ab + beta * (c - ab)
