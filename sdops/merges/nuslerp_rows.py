"""Spherical interpolation of two models, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._geometry import OPPOSITE, PARALLEL, normalized
from sdops.merges._rows import as_rows, inner

EXECUTION = "rows"


def nuslerp_rows(a: Tensor, b: Tensor, *, weights: tuple[float, ...] = ()) -> Tensor:
    """slerp of every row of a and b, each at its own angle, at alpha = w_b / (w_a + w_b).

    A row is all that has the same index in dimension 0: one output channel. Limits as in `slerp`, per row.

    Source: arcee-ai/mergekit, `nuslerp` without `nuslerp_flatten`, for matrices.

    Args:
        weights: Two numbers; none means halfway.

    Raises:
        UsageError: the number of weights is not two, or they sum to zero.
    """
    alpha = float(normalized(weights, 2)[1])
    x, y = as_rows(a), as_rows(b)
    exact_x, exact_y = x.double(), y.double()
    scale = (inner(exact_x, exact_x) * inner(exact_y, exact_y)).sqrt()  # (r, 1)
    cosine = inner(exact_x, exact_y) / torch.where(scale == 0, 1.0, scale)
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()
    angle = torch.atan2(sine, cosine)
    straight = (scale == 0) | (sine < PARALLEL) | (cosine < OPPOSITE)
    sine = torch.where(straight, 1.0, sine)
    of_a = torch.where(straight, 1 - alpha, torch.sin((1 - alpha) * angle) / sine)
    of_b = torch.where(straight, alpha, torch.sin(alpha * angle) / sine)
    return (of_a.to(a.dtype) * x + of_b.to(a.dtype) * y).reshape(a.shape)
