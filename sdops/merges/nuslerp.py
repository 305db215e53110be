"""Spherical interpolation of two models by a weight for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._geometry import normalized
from sdops.merges.slerp import slerp

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "a, b"


def nuslerp(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """slerp of a and b at alpha = w_b / (w_a + w_b).

    Whole tensors are taken as vectors. `nuslerp_rows` goes row by row, `nuslerp_task` takes changes since a base.

    Source: arcee-ai/mergekit, `nuslerp` with `nuslerp_flatten`, where weights that sum to zero mean 0.5.

    Args:
        weights: Two numbers; none means halfway.

    Raises:
        UsageError: the number of weights is not two, or they sum to zero.
    """
    return slerp(gram, alpha=float(normalized(weights, 2)[1]))
