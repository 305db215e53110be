"""Choosing by arithmetic gives the bits that choosing gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdops.core.elementwise import above, masked, where, zeros_of

VALUES = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, math.inf, -math.inf, math.nan]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of values, with either choice."""
    grid = torch.cartesian_prod(*[torch.tensor(VALUES, dtype=dtype)] * 2)
    x, y = grid.repeat(2, 1).T.contiguous()
    return torch.arange(len(x)) < len(grid), x, y


def same(result: Tensor, expected: Tensor) -> bool:
    integer = torch.int32 if expected.dtype == torch.float32 else torch.int64
    return result.dtype == expected.dtype and torch.equal(result.view(integer), expected.view(integer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_torch_where(dtype: torch.dtype) -> None:
    mask, x, y = pairs(dtype)
    assert same(where(mask, x, y), torch.where(mask, x, y))
    assert same(masked(x, mask), torch.where(mask, x, 0.0))
    assert same(zeros_of(x), (x == 0).to(dtype))
    assert same(above(x, 0.5), (x > 0.5).to(dtype))


def test_mixed_dtypes_give_the_wider_one() -> None:
    mask, x, _ = pairs(torch.float32)
    y = torch.linspace(0, 1, len(x), dtype=torch.float64)
    assert same(where(mask, x, y), torch.where(mask, x.double(), y))
