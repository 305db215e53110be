"""Where models differ most, add what the majority of them changed, by how much each changed."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.core.elementwise import zeros_of
from sdops.core.select import window_mask
from sdops.merges._knobs import share
from sdops.merges._sparse import deltas

EXECUTION = "tensor"


def sce(base: Tensor, *models: Tensor, density: float = 1.0) -> Tensor:
    """base + sum_i v_i d_i a_i / sum_i v_i a_i   (select, calculate, erase).

    Select: of the deltas x_i - base keep those elements whose variance over the models is largest, `density` times
    the number of non-zero variances; at density 1 all. Calculate: v_i = mean(d_i^2) over the tensor, divided by their
    sum. Erase: a_i is 1 where d_i has the sign of sum_j d_j (0 counts as +), else 0. mergekit takes equal v_i where
    the sum is below 1e-6, as in most diffusion models; here only where it is 0.

    Source: Wan et al., FuseChat, https://arxiv.org/abs/2408.07990; arcee-ai/mergekit, `sce` (`select_topk`).

    Args:
        density (0 to 1): Share of the elements that are selected.

    Raises:
        UsageError: the density is outside [0, 1].
    """
    changes = torch.stack(deltas(base, models))
    if share("density", density) < 1:
        variance = changes.var(0, correction=0).to(torch.float32).reshape(1, -1)
        count = int(int(torch.count_nonzero(variance)) * density)
        changes *= window_mask(variance, 0, count).reshape(base.shape)
    squares = torch.linalg.vector_norm(changes.reshape(len(models), -1), dim=1, dtype=torch.float64) ** 2
    squares = squares if squares.sum() > 0 else torch.ones_like(squares)
    weights = (squares / squares.sum()).to(base.dtype).reshape(-1, *[1] * base.ndim)
    total = changes.sum(0)
    direction = torch.ones_like(total).copysign_(total)
    agree = (changes * direction).clamp_(min=0).sign_()  # along the direction those that agree are positive
    weights = weights * agree
    divisor = weights.sum(0)
    return base + (weights * changes).sum(0) / (divisor + zeros_of(divisor))
