"""Keep what one model alone changed, average what several changed."""

from __future__ import annotations

import torch
from torch import Tensor

EXECUTION = "elementwise"


def ram(base: Tensor, *models: Tensor, epsilon: float = 1e-5) -> Tensor:
    """base + mean of the deltas x_i - base with |delta_i| > epsilon; base where there are none.

    Unlike in an average, a change that a single model made keeps its size.

    Source: Reinforced Agent Merging, https://arxiv.org/abs/2601.13572; arcee-ai/mergekit, `ram`.

    Args:
        epsilon (0 or more): Smaller changes do not count.
    """
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for model in models:
        delta = model - base
        changed = delta.abs().gt_(epsilon)  # 1 or 0
        total += changed * delta
        count += changed
    return base + total / count.clamp(min=1)
