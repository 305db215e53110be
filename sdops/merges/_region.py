"""A range of places that may run past the end and go on at the start."""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from sdops.merges._knobs import share


def in_region(places: Tensor, count: int, width: float, offset: float) -> Tensor:
    """Which places 0 .. count - 1 lie in [offset, offset + width), in shares of `count`; ends rounded, wrapping.

    Raises:
        UsageError: the width is outside [0, 1].
    """
    share("alpha", width)
    if width == 1:
        return torch.ones_like(places, dtype=torch.bool)
    first, last = (floor(end * count + 0.5) for end in (offset % 1, offset % 1 + width))
    return ((places >= first) & (places < last)) | (places < last - count)
