"""Weighted sum of three models at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def triple_sum(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, beta: float = 0.25) -> Tensor:
    """(1 - alpha - beta) a + alpha b + beta c.

    Source: hako-mikan/sd-webui-supermerger, "Triple sum".

    Args:
        alpha: Share of b.
        beta: Share of c.
    """
    return a + alpha * (b - a) + beta * (c - a)
