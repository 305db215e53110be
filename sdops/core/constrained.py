"""Constrained least squares in closed form: a matrix that maps some rows exactly and changes others least.

    minimise |(W' - W) K^T|_F^2  subject to  W' K*^T = V*^T
    W' = W + (V*^T - W K*^T) (D K*^T)^-1 D,    D = K* C^-1,    C = K^T K

The change has the rank of K*, and comes as factors. Source: Kumari et al., Multi-Concept Customization of Text-to-Image
Diffusion, CVPR 2023, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

RIDGE = 1e-6  # of the mean eigenvalue of C, where K leaves directions out
ALIKE = 1e-6  # a row of which less than this is left beside the others says nothing new


@dataclass(frozen=True)
class Constraint:
    """The rows that are to be mapped exactly, ready for any number of matrices.

    Attributes:
        rows: K* [n, d].
        down: D [n, d], one factor of every change.
        inner: D K*^T [n, n].
    """

    rows: Doubles
    down: Doubles
    inner: Doubles

    def up(self, missing: Doubles) -> Doubles:
        """The other factor [o, n] of the change of a matrix that misses its targets by V*^T - W K*^T [o, n]."""
        return np.asarray(np.linalg.solve(self.inner.T, missing.T).T)


def constraint(kept: Doubles, rows: Doubles) -> Constraint:
    """The constraint of mapping `rows` [n, d] exactly while what `kept` [N, d] is mapped to changes least."""
    gram = kept.T @ kept
    gram[np.diag_indices_from(gram)] += RIDGE * float(gram.diagonal().mean())
    down = np.linalg.solve(gram, rows.T).T
    down /= np.linalg.norm(down, axis=1, keepdims=True)  # any scale of D gives the same W'
    return Constraint(rows, np.asarray(down), np.asarray(down @ rows.T))


def independent(rows: Doubles) -> list[int]:
    """Numbers of the rows that are no combination of earlier ones."""
    basis = np.zeros((0, rows.shape[1]))
    kept = []
    for number, row in enumerate(rows):
        rest = row - basis.T @ (basis @ row)
        rest -= basis.T @ (basis @ rest)
        length = float(np.linalg.norm(rest))
        if length > ALIKE * float(np.linalg.norm(row)):
            basis = np.concatenate([basis, rest[None] / length])
            kept.append(number)
    return kept
