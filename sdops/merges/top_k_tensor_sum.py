"""Arrange one model's values in the order of another's."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._region import in_region

EXECUTION = "tensor"


def top_k_tensor_sum(a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """x_i = sort(a)[rank of b_i in b],   taken where |x_i| is among the chosen magnitudes of a, otherwise a_i.

    Chosen are those whose rank r among the n magnitudes of a, smallest first, has beta <= r / n < alpha + beta; past
    the end it goes on at the smallest. alpha 0 is a; alpha 1 has a's values in b's order. Equal values rank by flat
    index, so exactly the share alpha of the values is chosen (peers take all that equal the border).

    Source: s1dlx/meh and ljleb/sd-mecha, `top_k_tensor_sum` (knobs width and offset).

    Args:
        alpha (0 to 1): Share of the values that move.
        beta: Where the chosen magnitudes begin: 0 = smallest; 1.25 is 0.25.
    """
    values = a.flatten()
    order = values.argsort(stable=True)
    place = _ranks(b.flatten())
    chosen = in_region(_ranks(values.abs()), len(values), alpha, beta)
    return torch.where(chosen[order][place], values[order][place], values).reshape(a.shape)


def _ranks(values: Tensor) -> Tensor:
    """The place of each element in ascending order, equal ones by index."""
    ranks = torch.empty(len(values), dtype=torch.int64)
    ranks[values.argsort(stable=True)] = torch.arange(len(values))
    return ranks
