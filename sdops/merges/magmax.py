"""Of several models' changes keep the largest, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._masks import where

EXECUTION = "elementwise"


def magmax(base: Tensor, *models: Tensor, scale: float = 0.5) -> Tensor:
    """base + scale delta_j,   j = argmax_i |delta_i|,   delta_i = x_i - base; of equal sizes the later model wins.

    Source: Marczak et al., MagMax, https://arxiv.org/abs/2407.06322; tanganke/fusion_bench (default of the scale).

    Args:
        scale: Factor of the change; 1 keeps its full size.
    """
    largest = torch.zeros_like(base)
    for model in models:
        delta = model - base
        largest = where(delta.abs() >= largest.abs(), delta, largest)
    return base + scale * largest
