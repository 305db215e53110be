"""Of several models' changes keep the largest, element by element."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from sdops.core.elementwise import where
from sdops.merges._sparse import deltas

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def magmax(base: Tensor, *models: Tensor, scale: float = 0.5) -> Tensor:
    """base + scale delta_j,   j = argmax_i |delta_i|,   delta_i = x_i - base; of equal sizes the later model wins.

    Source: Marczak et al., MagMax, https://arxiv.org/abs/2407.06322; tanganke/fusion_bench (default of the scale).

    Args:
        scale: Factor of the change; 1 keeps its full size.
    """
    return base + scale * reduce(_larger, deltas(base, models))


def _larger(x: Tensor, y: Tensor) -> Tensor:
    """y where it is as large as x or larger, else x."""
    return where(abs(y) >= abs(x), y, x)
