"""Add what several models learnt since a common base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.merges._knobs import per_model

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def task_arithmetic(
    base: Tensor,
    *models: Tensor,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i (x_i - base), with `normalize` w_i / sum_j w_j in place of w_i.

    Source: Ilharco et al., Editing Models with Task Arithmetic, https://arxiv.org/abs/2212.04089; arcee-ai/mergekit.

    Args:
        weights: One number per model, the base not counted; none means 1 for each. Negative ones unlearn.
        scale: Factor of the sum (lambda in the paper).
        normalize: Divide the weights by their sum.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero and cannot be normalised.
    """
    scales = per_model(weights, len(models))
    total = sum(scales) if normalize else 1
    if abs(total) < 1e-12:
        raise UsageError(
            f"the weights {scales} sum to zero", hint="change a weight, or switch `normalize` off", weights=scales
        )
    result = base
    for weight, model in zip(scales, models, strict=True):
        result = result + (scale * weight / total) * (model - base)
    return result
