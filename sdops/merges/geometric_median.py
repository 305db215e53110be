"""The point with the least sum of distances to any number of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdops.errors import UsageError
from sdops.merges._geometry import NEGLIGIBLE, normalized

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "*models"

MAX_STEPS = 100
TOLERANCE = 1e-12  # of the last step, relative to the largest distance


def geometric_median(gram: Gram, *, weights: tuple[float, ...] = ()) -> Coefficients:
    """y = argmin sum_i w_i |x_i - y|,   whole tensors as vectors.

    The model x_k with the least sum is the median if the others pull no harder than it weighs,
    |sum_i w_i (x_i - x_k) / |x_i - x_k|| <= w_k. Otherwise go on from it by Weiszfeld's steps
    y <- sum_i v_i x_i / sum_i v_i, v_i = w_i / |x_i - y|, or by Newton's, shortened if need be, where they lead
    further down. A model far away from the others has little influence.

    Source: Weiszfeld, Tohoku Math. J. 43, 1937; Vardi and Zhang, PNAS 97, 2000; ljleb/sd-mecha, `geometric_median`.

    Args:
        weights (0 or more): One number per model; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, one is negative, or they sum to zero.
    """
    if min(weights, default=0) < 0:
        raise UsageError(f"the weights {weights} are not all positive", hint="change a weight", weights=weights)
    pull = normalized(weights, len(gram))
    points = _coordinates(gram)
    best = int(np.argmin([_sum_of_distances(point, points, pull) for point in points]))
    here = _distances(points[best], points) == 0
    others = np.where(here, 0.0, pull / np.where(here, 1.0, _distances(points[best], points)))
    force, own = np.linalg.norm(others @ (points - points[best])), pull[here].sum()
    if force <= own * (1 + 1e-12):
        only: Coefficients = (np.arange(len(pull)) == best).astype(np.float64)
        return only
    # Vardi and Zhang's first step leaves x_k downwards, so that no later one meets a model again.
    away = others @ points / others.sum()
    return _descend(away + own / force * (points[best] - away), points, pull)


def _coordinates(gram: np.ndarray) -> np.ndarray:
    """N points in N dimensions with the distances of the models (classical scaling)."""
    diagonal = np.diagonal(gram)
    sums = diagonal[:, None] + diagonal[None, :]
    squares = sums - 2 * gram
    squares[squares <= NEGLIGIBLE * sums] = 0.0
    centre = np.eye(len(gram)) - 1 / len(gram)
    values, directions = np.linalg.eigh(-0.5 * centre @ squares @ centre)
    points: np.ndarray = directions * np.sqrt(np.maximum(values, 0.0))
    for index in range(len(points)):  # equal models stay exactly equal
        points[squares[index] == 0] = points[index]
    return points


def _distances(y: np.ndarray, points: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.linalg.norm(points - y, axis=1)
    return distances


def _sum_of_distances(y: np.ndarray, points: np.ndarray, pull: np.ndarray) -> float:
    return float(pull @ _distances(y, points))


def _descend(y: np.ndarray, points: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """The median's coefficients, from a point y below all models."""
    for _ in range(MAX_STEPS):
        distances = _distances(y, points)
        force = pull / distances
        units = (points - y) / distances[:, None]
        hessian = force.sum() * np.eye(len(y)) - (units.T * force) @ units
        newton = np.linalg.lstsq(hessian, pull @ units, rcond=None)[0]
        steps = [newton * 0.5**halvings for halvings in range(10)]
        steps.append(force @ points / force.sum() - y)  # Weiszfeld's, which never leads up
        step = steps[int(np.argmin([_sum_of_distances(y + step, points, pull) for step in steps]))]
        y = y + step
        if np.linalg.norm(step) <= TOLERANCE * distances.max():
            break
    force = pull / _distances(y, points)
    coefficients: np.ndarray = force / force.sum()
    return coefficients
