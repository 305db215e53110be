"""The centre of any number of models on the sphere."""

from __future__ import annotations

from math import cos, sin
from typing import TYPE_CHECKING

import numpy as np

from sdops.merges._geometry import PARALLEL, length, normalized

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "*models"

MAX_STEPS = 100
TOLERANCE = 1e-12  # of the last step, in radians


def karcher(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """u sum_i w_i |x_i|,   u = the direction that minimises sum_i w_i angle(u, x_i)^2,   sum_i w_i = 1.

    Steps from the mean direction: T = sum_i w_i t_i / sin t_i (u_i - cos t_i u) with t_i the angle from u to
    u_i = x_i / |x_i|, then u <- u cos|T| + T / |T| sin|T|, until |T| < 1e-12. Zero tensors have no direction and only
    shorten the mean length. mergekit has equal weights alone and stops after 10 steps or at 1e-5.

    Source: Karcher, Riemannian Center of Mass, 1977; arcee-ai/mergekit, `karcher`, https://arxiv.org/abs/2603.04972

    Args:
        weights: One number per model; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero.
    """
    shares = normalized(weights, len(gram))
    norms = np.sqrt(gram.diagonal())
    inverse = (norms > 0) / np.maximum(norms, 1e-300)
    unit_gram = inverse[:, None] * gram * inverse
    pull = shares * (norms > 0)
    pull = pull / pull.sum() if pull.sum() != 0 else shares
    centre = _start(unit_gram, pull)
    for _ in range(MAX_STEPS):
        step = _tangent(unit_gram, pull, centre)
        size = length(step, unit_gram)
        if size < TOLERANCE:
            break
        centre = centre * cos(size) + step / size * sin(size)
        centre = centre / length(centre, unit_gram)
    return centre * inverse * (shares @ norms)


def _start(unit_gram: Gram, pull: Coefficients) -> Coefficients:
    """The mean direction, or the first one that exists if they cancel out."""
    size = length(pull, unit_gram)
    if size > 1e-6:
        return pull / size
    only: Coefficients = (np.arange(len(pull)) == unit_gram.diagonal().argmax()).astype(np.float64)
    return only


def _tangent(unit_gram: Gram, pull: Coefficients, centre: Coefficients) -> Coefficients:
    """Coefficients of T, the weighted sum of the directions from `centre` to every model, as long as the angles."""
    cosine = (unit_gram @ centre).clip(-1, 1)
    sine = np.sqrt((1 - cosine) * (1 + cosine))
    # t / sin t -> 1 for t -> 0; there is no direction towards the opposite point.
    stretch = np.where(sine > PARALLEL, np.arctan2(sine, cosine) / np.maximum(sine, PARALLEL), cosine > 0)
    scaled = pull * stretch
    tangent: Coefficients = scaled - (scaled @ cosine) * centre
    return tangent
