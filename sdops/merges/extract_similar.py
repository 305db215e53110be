"""Add what two models changed in the same direction."""

from __future__ import annotations

from torch import Tensor

from sdops.merges._similarity import closeness

EXECUTION = "rows"


def extract_similar(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 0.5, gamma: float = 1.0) -> Tensor:
    """a + d ((1 - alpha) x + alpha y),   d = ((cos(x, y) + 1) / 2)^gamma,   x = b - a,   y = c - a.

    The cosine is taken over the last dimension; it is 0 where x or y is 0. a is the common base. supermerger's beta
    mixes this method (beta 0) and extract_dissimilar (beta 1): a weighted sum of the two gives any beta.

    Source: hako-mikan/sd-webui-supermerger, "extract".

    Args:
        alpha: Share of c's change, the rest is b's.
        gamma: Sharpness: larger values keep only what is very similar.
    """
    x, y = b - a, c - a
    return a + closeness(x, y, gamma) * (x + alpha * (y - x))
