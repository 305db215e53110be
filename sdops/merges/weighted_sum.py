"""Go a share of the way from one model to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def weighted_sum(a: Tensor, b: Tensor, *, alpha: float = 0.5) -> Tensor:
    """a + alpha (b - a).

    alpha 0 is a, alpha 1 is b; values outside [0, 1] extrapolate. ComfyUI's `ratio` is the share of the first
    model: ratio = 1 - alpha.

    Source: AUTOMATIC1111/stable-diffusion-webui, "Weighted sum".

    Args:
        alpha: Share of b.
    """
    return a + alpha * (b - a)
