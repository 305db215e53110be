"""Take the low frequencies of one model and the high ones of another, in the order of a third model's values."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._knobs import share
from sdops.merges._spectrum import crossfade

EXECUTION = "tensor"


def distribution_crossover(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, tilt: float = 0.0) -> Tensor:
    """P^-1 irfft((1 - s(f)) rfft(P a) + s(f) rfft(P b)),   P = the permutation that sorts c.

    s(f) as in `crossover`: with tilt 0 it is 1 for the share alpha of the highest frequencies. alpha 0 is a, alpha 1
    is b. Equal values of c keep their order.

    Source: s1dlx/meh, `distribution_crossover`, whose alpha is the share of a: 1 - alpha; its beta, the width of the
    slope, has become sd-mecha's tilt, which keeps both ends exact.

    Args:
        alpha (0 to 1): Share of b.
        tilt: 0 divides the frequencies sharply, 1 mixes all alike, 2 divides them the other way round.
    """
    share("alpha", alpha)
    if alpha in (0, 1) or tilt == 1 or a.numel() < 2 or torch.equal(a, b):
        return torch.lerp(a, b, alpha)
    order = c.flatten().argsort(stable=True)
    merged = torch.empty_like(a).flatten()
    merged[order] = crossfade(a.flatten()[order], b.flatten()[order], alpha, tilt)
    return merged.reshape(a.shape)
