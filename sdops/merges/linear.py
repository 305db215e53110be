"""Weighted average of any number of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.merges._knobs import per_model

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def linear(*models: Tensor, weights: tuple[float, ...] = (), normalize: bool = True) -> Tensor:
    """sum_i w_i x_i / sum_i w_i, or without the division if `normalize` is off.

    Normalised it is computed as x_0 + sum_{i>0} v_i (x_i - x_0), v_i = w_i / sum w: the first model takes the
    remainder, so that the weights add up to exactly 1 and equal models give themselves. A weight may be 0 or negative.

    Source: arcee-ai/mergekit, `linear`; model soups, https://arxiv.org/abs/2203.05482

    Args:
        weights: One number per model; none means all equal.
        normalize: Divide the weights by their sum.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero and cannot be normalised.
    """
    scales = per_model(weights, len(models))
    first, rest = models[0], models[1:]
    if not normalize:
        result = scales[0] * first
        for scale, model in zip(scales[1:], rest, strict=True):
            result = result + scale * model
        return result
    total = sum(scales)
    if abs(total) < 1e-12:
        raise UsageError(
            f"the weights {scales} sum to zero", hint="change a weight, or switch `normalize` off", weights=scales
        )
    result = first
    for scale, model in zip(scales[1:], rest, strict=True):
        result = result + (scale / total) * (model - first)
    return result
