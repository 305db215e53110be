"""Add what another model learnt, without the part along the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "a, b, c"


def perpendicular(gram: Gram, *, alpha: float = 1.0) -> Coefficients:
    """a + alpha (d - a <a, d> / <a, a>),   d = b - c,   whole tensors as vectors; a + alpha d if a is zero.

    Unlike `add_difference` it does not scale what is already there.

    Source: Faildes/Chattiori-Model-Merger, "Orthogonalized Difference".

    Args:
        alpha: Factor of the change.
    """
    (aa, ab, ac), _, _ = gram.tolist()
    along = (ab - ac) / aa if aa else 0.0
    return np.array([1 - alpha * along, alpha, -alpha])
