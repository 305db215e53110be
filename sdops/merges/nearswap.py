"""Take the second model where it is near the first, interpolate elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

EXECUTION = "elementwise"


def nearswap(a: Tensor, b: Tensor, *, t: float = 0.0001) -> Tensor:
    """(1 - w) a + w b,   w = clip(t / max(|a - b|, 1e-6), 0, 1).

    Weights that differ by less than t become b's, all others move by t towards b.

    Source: arcee-ai/mergekit, `nearswap` (a is its base model); alchemonaut's BoreanGale.

    Args:
        t: Largest change of a weight.
    """
    share = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return torch.lerp(a, b, share)  # exactly b where the share is 1
