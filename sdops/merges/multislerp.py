"""Mean direction of any number of models, with their mean length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdops.merges._geometry import length, normalized

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "*models"

# Mean of unit vectors shorter than this: they cancel out, and it has no direction.
CANCELLED = 1e-6


def multislerp(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """m sum_i w_i |x_i|,   m = unit(sum_i w_i x_i / |x_i|),   sum_i w_i = 1.

    mergekit projects the directions onto the tangent space at m, averages them there and maps the average back.
    That average is zero, because m is along the mean itself, so the result is m: the same, said shorter.
    A zero tensor has no direction and only shortens the mean length. Where the directions cancel out, the
    weighted mean of the tensors takes the place of the formula (mergekit: an error for more than two models).

    Source: https://goddard.blog/posts/multislerp-wow-what-a-cool-idea; arcee-ai/mergekit, `multislerp`.

    Args:
        weights: One number per model; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero.
    """
    shares = normalized(weights, len(gram))
    norms = np.sqrt(gram.diagonal())
    directions = shares * (norms > 0) / np.maximum(norms, 1e-300)
    size = length(directions, gram)
    if size < CANCELLED:
        return shares
    return directions / size * (shares @ norms)
