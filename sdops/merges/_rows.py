"""Rows of tensors, for the methods of class "rows"."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(r, ...) as a matrix (r, n); 0-d and 1-d tensors are one row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of two float64 matrices (r, n), (r, 1)."""
    products: Tensor = torch.linalg.vecdot(x, y)
    return products.unsqueeze(1)
