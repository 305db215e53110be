"""What of one model is not along another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "a, b"


def perpendicular_component(gram: Gram) -> Coefficients:
    """a - b <a, b> / <b, b>,   whole tensors as vectors; a if b is zero.

    Source: ljleb/sd-mecha, `perpendicular_component`.
    """
    (_, ab), (_, bb) = gram.tolist()
    return np.array([1.0, -ab / bb if bb else 0.0])
