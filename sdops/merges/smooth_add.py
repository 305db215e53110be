"""Add a difference from which outliers and noise were filtered."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

EXECUTION = "tensor"

RADIUS = 4  # where the Gaussian is cut: four standard deviations
BLOCK = 1 << 20  # neighbours gathered at once


def smooth_add(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a + alpha gaussian(median(b - c)).

    median: of the 3^d neighbours along all d dimensions; gaussian: standard deviation 1 along every dimension, cut at
    4. Beyond its borders a tensor is continued by its mirror image (d c b a | a b c d | d c b a).

    Source: hako-mikan/sd-webui-supermerger, "smoothAdd" (median_filter(size=3) and gaussian_filter(sigma=1) of scipy).

    Args:
        alpha: Factor of the filtered difference.
    """
    return a + alpha * gaussian(median(b - c))


def median(x: Tensor) -> Tensor:
    """Median of the 3^d neighbours of each element."""
    shape = x.shape
    x = x.squeeze()  # along a dimension of size 1 all neighbours are the element itself
    if x.ndim == 0 or x.numel() == 0:
        return x.reshape(shape)
    rows = max(1, BLOCK // (x[0].numel() * 3**x.ndim))
    padded = x
    for dim in range(x.ndim):
        padded = padded.index_select(dim, _mirrored(x.shape[dim], 1))
    blocks = []
    for start in range(0, len(x), rows):
        windows = padded[start : start + rows + 2]
        for dim in range(x.ndim):
            windows = windows.unfold(dim, 3, 1)  # adds a last dimension of 3
        neighbours = windows.flatten(x.ndim).numpy(force=True)
        blocks.append(torch.from_numpy(np.sort(neighbours)[..., 3**x.ndim // 2]))  # faster than Tensor.median
    return torch.cat(blocks).reshape(shape).to(x.device)


def gaussian(x: Tensor) -> Tensor:
    """x convolved with a normalised Gaussian of standard deviation 1 along every dimension."""
    kernel = [math.exp(-(step**2) / 2) for step in range(-RADIUS, RADIUS + 1)]
    for dim, size in enumerate(x.shape):
        if size > 1:
            places = _mirrored(size, RADIUS)
            parts = zip(kernel, places.unfold(0, size, 1), strict=True)
            x = sum((weight / sum(kernel) * x.index_select(dim, place) for weight, place in parts), torch.zeros_like(x))
    return x


def _mirrored(size: int, radius: int) -> Tensor:
    """Indices -radius .. size - 1 + radius, mapped into the tensor; the mirror images repeat for wide radii."""
    places = torch.arange(-radius, size + radius) % (2 * size)
    return torch.minimum(places, 2 * size - 1 - places)
