"""Add what two models changed in different directions."""

from __future__ import annotations

from torch import Tensor

from sdops.merges._similarity import closeness

EXECUTION = "rows"


def extract_dissimilar(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, gamma: float = 1.0) -> Tensor:
    """a + (1 - d) ((1 - alpha) x + alpha y),   d = ((cos(x, y) + 1) / 2)^gamma,   x = b - a,   y = c - a.

    The cosine is taken over the last dimension; it is 0 where x or y is 0. a is the common base. The counterpart of
    extract_similar.

    Source: hako-mikan/sd-webui-supermerger, "extract" with beta = 1.

    Args:
        alpha: Share of c's change, the rest is b's.
        gamma: Sharpness: larger values leave out only what is very similar.
    """
    x, y = b - a, c - a
    return a + (1 - closeness(x, y, gamma)) * (x + alpha * (y - x))
