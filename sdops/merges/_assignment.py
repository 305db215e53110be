"""The linear assignment problem: which column for which row, so that the sum is largest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]
Columns = NDArray[np.int64]


def assign(gains: Matrix) -> Columns:
    """The permutation p that maximises sum_i gains[i, p_i], for a square matrix (n, n) of finite numbers.

    If the best columns of all rows differ, they are the answer: O(n^2). Otherwise shortest augmenting paths, O(n^3)
    (Jonker and Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems, 1987).
    """
    size = len(gains)
    best = gains.argmax(axis=1) if size else np.empty(0, np.int64)
    if len(np.unique(best)) == size:
        return best.astype(np.int64)
    costs = gains.max() - np.asarray(gains, np.float64)
    row_of = np.full(size, -1)  # of each column
    column_of = np.full(size, -1)  # of each row
    # reduction: a column's price is its lowest cost; where that row is still free it gets the column
    price = costs.min(axis=0)
    for column, row in enumerate(costs.argmin(axis=0)):
        if column_of[row] < 0:
            row_of[column], column_of[row] = row, column
    for row in np.flatnonzero(column_of < 0):
        _augment(costs, price, row_of, column_of, row)
    return column_of.astype(np.int64)


def _augment(costs: Matrix, price: Matrix, row_of: Columns, column_of: Columns, start: np.intp) -> None:
    """Give row `start` a column along the shortest alternating path, in place (Dijkstra with reduced costs)."""
    size = len(costs)
    distance = costs[start] - price
    before = np.full(size, start)  # the row from which a column was reached
    done = np.zeros(size, bool)
    while True:
        open_distance = np.where(done, np.inf, distance)
        column = int(open_distance.argmin())
        shortest = distance[column]
        if row_of[column] < 0:
            break
        done[column] = True
        row = row_of[column]
        through = shortest + (costs[row] - price) - (costs[row, column] - price[column])
        closer = ~done & (through < distance)
        distance[closer] = through[closer]
        before[closer] = row
    price[done] += distance[done] - shortest
    while True:
        row = before[column]
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
