"""As ram, with what one model alone changed made stronger the more it shares elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.core.elementwise import masked

EXECUTION = "tensor"


def ram_plus_tl(base: Tensor, *models: Tensor, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Tensor:
    """base + mean over the models with |delta_i| > epsilon of delta_i; a model alone there counts lambda_i times.

    delta_i = x_i - base. Of model i's changed elements, shared_i are changed by another model too and unique_i are
    not:   lambda_i = 1 + r clip(shared_i / max(unique_i, epsilon), 0, alpha).

    Source: Reinforced Agent Merging, https://arxiv.org/abs/2601.13572; arcee-ai/mergekit, `ramplus_tl`.

    Args:
        epsilon (0 or more): Smaller changes do not count.
        r: How much the sharing strengthens a model's own changes.
        alpha: Limit of the quotient shared / unique.
    """
    deltas = [model - base for model in models]
    changed = [delta.abs() > epsilon for delta in deltas]
    count = torch.zeros_like(base)
    for mask in changed:
        count += mask
    total = torch.zeros_like(base)
    for delta, mask in zip(deltas, changed, strict=True):
        alone = mask & (count == 1)
        unique = int(alone.sum())
        shared = int(mask.sum()) - unique
        stronger = 1 + r * min(max(shared / (max(unique, epsilon) or 1), 0.0), alpha)
        total += masked(delta, mask) * torch.where(alone, stronger, 1.0)
    return base + total / count.clamp(min=1)
