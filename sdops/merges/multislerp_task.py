"""Mean direction of what several models learnt since a common base, with the mean length."""

from __future__ import annotations

from torch import Tensor

from sdops.merges._geometry import delta_gram, onto_base
from sdops.merges.multislerp import multislerp

EXECUTION = "gram"
INPUTS = "base, *models"


def multislerp_task(gram: Tensor, *, weights: tuple[float, ...] = ()) -> Tensor:
    """base + multislerp of the deltas x_i - base.

    Source: arcee-ai/mergekit, `multislerp` with a base model.

    Args:
        weights: One number per model, the base not counted; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero.
    """
    return onto_base(multislerp(delta_gram(gram), weights=weights))
