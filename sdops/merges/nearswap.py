"""Take the second model where it is near the first, interpolate elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.core.elementwise import maximum, minimum, where

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def nearswap(a: Tensor, b: Tensor, *, t: float = 0.0001) -> Tensor:
    """(1 - w) a + w b,   w = clip(t / max(|a - b|, 1e-6), 0, 1).

    Weights that differ by less than t become b's, all others move by t towards b.

    Source: arcee-ai/mergekit, `nearswap` (a is its base model); alchemonaut's BoreanGale.

    Args:
        t: Largest change of a weight.
    """
    share = minimum(maximum(t / maximum(abs(a - b), 1e-6), 0), 1)
    return where(share < 1, a + share * (b - a), b)
