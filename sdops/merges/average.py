"""Plain mean of any number of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def average(*models: Tensor) -> Tensor:
    """sum_i x_i / N, computed as x_0 + sum_{i>0} (x_i - x_0) / N: all at once, so that only one rounding happens.

    A chain of merges of two models at alpha 1/2, 1/3, 1/4 ... means the same, but rounds at every step.

    Source: ljleb/sd-mecha, `n_average`; model soups, https://arxiv.org/abs/2203.05482
    """
    first, rest = models[0], models[1:]
    result = first
    for model in rest:
        result = result + (1 / len(models)) * (model - first)
    return result
