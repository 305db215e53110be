"""Spherical interpolation of what two models learnt since a common base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._geometry import delta_gram, onto_base
from sdops.merges.nuslerp import nuslerp

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "base, a, b"


def nuslerp_task(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """base + slerp(a - base, b - base) at alpha = w_b / (w_a + w_b).

    Source: arcee-ai/mergekit, `nuslerp` with a base model.

    Args:
        weights: Two numbers; none means halfway.

    Raises:
        UsageError: the number of weights is not two, or they sum to zero.
    """
    return onto_base(nuslerp(delta_gram(gram), weights=weights))
