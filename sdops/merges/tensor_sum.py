"""Replace a range of rows or columns of every tensor by those of another model."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._region import in_region

EXECUTION = "tensor"

MIN_COLUMNS = 101


def tensor_sum(a: Tensor, b: Tensor, *, alpha: float = 0.5, beta: float = 0.0, dim: int = 0) -> Tensor:
    """Rows i of n with beta <= i / n < alpha + beta come from b, the others from a; past the end it goes on at row 0.

    Both ends are rounded to whole rows. A single number comes from b if alpha > 0.5. alpha 0 is a, alpha 1 is b.

    Source: hako-mikan/sd-webui-supermerger, "tensor" (dim 0) and "tensor2" (dim 1); sd-mecha calls the knobs width and
    offset.

    Args:
        alpha (0 to 1): Share of the rows that come from b.
        beta: Where they begin, as a share of all rows; 1.25 is 0.25.
        dim (0 to 1): 0 for rows, 1 for columns; tensors with 100 columns or fewer go by rows in any case.

    Raises:
        UsageError: alpha is outside [0, 1] or `dim` is neither 0 nor 1.
    """
    if dim not in (0, 1):
        raise UsageError(f"`dim` is {dim}", hint="0 exchanges rows, 1 columns", knob="dim", value=dim)
    if dim == 1 and (a.ndim < 2 or a.shape[1] < MIN_COLUMNS):
        dim = 0
    if a.ndim == 0:
        return b if alpha > 0.5 else a
    chosen = in_region(torch.arange(a.shape[dim]), a.shape[dim], alpha, beta)
    along = [1] * a.ndim
    along[dim] = -1
    return torch.where(chosen.reshape(along), b, a)
