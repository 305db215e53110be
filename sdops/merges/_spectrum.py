"""Cross-fading two spectra: how far each frequency lies from 0, and from which model it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def distance(shape: Sequence[int]) -> Tensor:
    """How far each frequency of `rfftn` lies from 0: sqrt(mean_i g_i^2), g_i = |k_i| / (n_i // 2), from 0 to 1.

    Args:
        shape: Sizes n_i > 1 of the real tensor.

    Returns:
        float64 in the shape of `rfftn`: the last dimension has n // 2 + 1 frequencies, without the negative ones.
    """
    *rest, last = shape
    counts = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in rest]
    counts.append(torch.fft.rfftfreq(last, 1 / last, dtype=torch.float64))
    squares = torch.zeros((), dtype=torch.float64)
    for k, n in zip(counts, shape, strict=True):
        squares = squares.unsqueeze(-1) + (k / (n // 2)).square()  # one more dimension each time
    return (squares / len(shape)).sqrt()


def share_of_second(f: Tensor, alpha: float, tilt: float) -> Tensor:
    """Share of the second model at frequency f in [0, 1]; the mean over all f grows from 0 to 1 with alpha.

    tilt 0            high frequencies come from the second model: 1 where f > 1 - alpha, else 0
    tilt in (0, 1]    clip(t (f + alpha - 1) + alpha, 0, 1),  t = 1 / tan(pi tilt / 2); alpha everywhere at tilt 1
    tilt in (1, 2)    clip(t (f - alpha) + alpha, 0, 1), t < 0; low frequencies come more and more from the second
    tilt in [2, 4)    1 - the share for 1 - alpha and tilt - 2; 2 is 1 where f <= alpha, and 4 is 0 again
    """
    tilt %= 4
    if tilt >= 2:
        return 1 - share_of_second(f, 1 - alpha, tilt - 2)
    if tilt == 0:
        return (f > 1 - alpha).to(f.dtype)
    slope = 1 / math.tan(math.pi * tilt / 2)
    anchor = 1 - alpha if tilt <= 1 else alpha
    return (slope * (f - anchor) + alpha).clamp(0, 1)


def crossfade(a: Tensor, b: Tensor, alpha: float, tilt: float) -> Tensor:
    """The tensor whose spectrum is (1 - s) rfftn(a) + s rfftn(b) with s = share_of_second(distance, alpha, tilt)."""
    share = share_of_second(distance(a.shape), alpha, tilt).to(a)
    first = torch.fft.rfftn(a)
    merged: Tensor = torch.fft.irfftn(first + share * (torch.fft.rfftn(b) - first), s=a.shape)
    return merged
