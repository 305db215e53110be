"""Mean direction of what several models learnt since a common base, with the mean length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._geometry import delta_gram, onto_base
from sdops.merges.multislerp import multislerp

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "base, *models"


def multislerp_task(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """base + multislerp of the deltas x_i - base.

    Source: arcee-ai/mergekit, `multislerp` with a base model.

    Args:
        weights: One number per model, the base not counted; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero.
    """
    return onto_base(multislerp(delta_gram(gram), weights=weights))
