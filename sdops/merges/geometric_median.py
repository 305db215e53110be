"""The point with the least sum of distances to any number of models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._geometry import NEGLIGIBLE, normalized

EXECUTION = "gram"
INPUTS = "*models"

MAX_STEPS = 500
TOLERANCE = 1e-10  # of the last change of a coefficient
ON_TOP = 1e-7  # y is on top of a model that is nearer than this share of the largest distance


def geometric_median(gram: Tensor, *, weights: tuple[float, ...] = ()) -> Tensor:
    """y = argmin sum_i w_i |x_i - y|,   whole tensors as vectors.

    A model that is the minimum itself is returned as it is: |sum_{j != i} w_j (x_j - x_i) / |x_j - x_i|| <= w_i.
    Otherwise Weiszfeld's steps y <- sum_i v_i x_i / sum_i v_i, v_i = w_i / |x_i - y|, from the weighted mean, until
    the coefficients change by less than 1e-10. One model far away from the others has little influence.

    Source: Weiszfeld, Tohoku Math. J. 43, 1937; Vardi and Zhang, PNAS 97, 2000; ljleb/sd-mecha, `geometric_median`.

    Args:
        weights: One non-negative number per model; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, one is negative, or they sum to zero.
    """
    if min(weights, default=0) < 0:
        raise UsageError(f"the weights {weights} are not all positive", hint="change a weight", weights=weights)
    pull = normalized(weights, len(gram)).numpy()
    squares = _squared_distances(gram.cpu().numpy())
    for index in range(len(pull)):
        force, own = _forces_on(index, squares, pull)
        if force <= own * (1 + 1e-12):
            return torch.eye(len(pull), dtype=torch.float64)[index]
    share = pull
    for _ in range(MAX_STEPS):
        following = _step(share, squares, pull)
        change = np.abs(following - share).max()
        share = following
        if change < TOLERANCE:
            break
    return torch.from_numpy(share)


def _squared_distances(gram: np.ndarray) -> np.ndarray:
    """|x_i - x_j|^2, rounding residue set to zero."""
    diagonal = np.diagonal(gram)
    sums = diagonal[:, None] + diagonal[None, :]
    squares: np.ndarray = sums - 2 * gram
    squares[squares <= NEGLIGIBLE * sums] = 0.0
    return squares


def _forces_on(index: int, squares: np.ndarray, pull: np.ndarray) -> tuple[float, float]:
    """|sum_j w_j (x_j - x_i) / |x_j - x_i|| over the models elsewhere, and the weight of the ones at x_i."""
    distances = np.sqrt(squares[index])
    here = distances == 0
    force = np.where(here, 0.0, pull / np.where(here, 1.0, distances))
    # <x_j - x_i, x_k - x_i> = (d_ij + d_ik - d_jk) / 2 for squared distances d.
    products = (squares[index][:, None] + squares[index][None, :] - squares) / 2
    return float(np.sqrt(max(force @ products @ force, 0.0))), float(pull[here].sum())


def _step(share: np.ndarray, squares: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """One step from y = sum_i share_i x_i; sum_i share_i = 1."""
    # |x_i - y|^2 = sum_j share_j d_ij - 1/2 sum_jk share_j share_k d_jk
    towards = squares @ share
    distances = np.sqrt(np.maximum(towards - 0.5 * share @ towards, 0.0))
    here = distances <= ON_TOP * distances.max()
    force = np.where(here, 0.0, pull / np.where(here, 1.0, distances))
    following: np.ndarray = force / force.sum()
    if here.any():  # Vardi and Zhang: a model under y holds it back, by its own weight
        index = int(here.argmax())
        others, own = _forces_on(index, squares, pull)
        following = following + own / others * (share - following)
    return following
