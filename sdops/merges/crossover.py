"""Take the low frequencies of one model's tensors and the high ones of another's."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._knobs import share
from sdops.merges._spectrum import crossfade

EXECUTION = "tensor"


def crossover(a: Tensor, b: Tensor, *, alpha: float = 0.5, tilt: float = 0.0) -> Tensor:
    """irfftn((1 - s(f)) rfftn(a) + s(f) rfftn(b)),   f = distance of a frequency from 0, scaled to [0, 1].

    With tilt 0, s is 1 above 1 - alpha and 0 below; tilt 1 is the weighted sum; between, s is a slope. Tilts from 1 to
    2 turn the slope further until the low frequencies come from b. alpha 0 is a, alpha 1 is b.

    f = sqrt(mean_i g_i^2), g_i = |frequency| along dimension i, 1 at the highest one. Dimensions of size 1 do not
    count, so a 1x1 convolution is merged as the linear layer that it is (in sd-mecha they do count).

    Source: ljleb/sd-mecha, `crossover`; its tilt 2 takes 1 - alpha for alpha, here it is the limit of the tilts beside.

    Args:
        alpha (0 to 1): Share of b.
        tilt: 0 divides the frequencies sharply, 1 mixes all alike, 2 divides them the other way round.
    """
    share("alpha", alpha)
    x, y = a.squeeze(), b.squeeze()
    if alpha in (0, 1) or tilt == 1 or x.ndim == 0 or x.numel() == 0 or torch.equal(a, b):
        return torch.lerp(a, b, alpha)
    return crossfade(x, y, alpha, tilt).reshape(a.shape)
