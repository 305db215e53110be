"""Arithmetic on the rows of embeddings: joining, averaging, turning, pruning. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdops.errors import MismatchError
from sdops.verbs._embed_facts import cosines

Rows = NDArray[np.float64]  # [n, width]
ALIKE = 0.95


def same_length(parts: Sequence[Rows]) -> None:
    """Refuse rows that cannot be paired.

    Raises:
        MismatchError: the parts have different numbers of vectors.
    """
    lengths = sorted({len(part) for part in parts})
    if len(lengths) > 1:
        raise MismatchError(
            f"{' and '.join(map(str, lengths))} vectors cannot be added one by one",
            hint="`pad(x, N)` fills up with zeros, `repeat(x, N)` with the vectors again, `mean(x)` makes them one",
        )


def concat(parts: Sequence[Rows]) -> Rows:
    """One below the other."""
    return np.concatenate(parts)


def average(parts: Sequence[Rows], weights: Sequence[float]) -> Rows:
    """sum w_i x_i / sum w_i, row by row.

    Raises:
        MismatchError: the parts have different numbers of vectors, or the weights add up to 0.
    """
    same_length(parts)
    total = sum(weights)
    if total == 0:
        raise MismatchError("the weights add up to 0", hint="mode `sum` adds without dividing")
    return add(parts, [weight / total for weight in weights])


def add(parts: Sequence[Rows], weights: Sequence[float]) -> Rows:
    """sum w_i x_i, row by row.

    Raises:
        MismatchError: the parts have different numbers of vectors.
    """
    same_length(parts)
    total: Rows = np.sum([weight * part for weight, part in zip(weights, parts, strict=True)], axis=0)
    return total


def slerp(a: Rows, b: Rows, t: float) -> Rows:
    """From a (t = 0) to b (t = 1) along the arc, lengths interpolated; along the line where the arc is not defined.

    Raises:
        MismatchError: a and b have different numbers of vectors.
    """
    same_length([a, b])
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (a, b)]
    units = [part / np.where(length > 0, length, 1) for part, length in zip((a, b), lengths, strict=True)]
    angle = np.arccos(np.clip((units[0] * units[1]).sum(axis=1, keepdims=True), -1, 1))
    sine = np.sin(angle)
    defined = sine > 1e-6
    safe = np.where(defined, sine, 1)
    direction = (np.sin((1 - t) * angle) * units[0] + np.sin(t * angle) * units[1]) / safe
    arc = direction * ((1 - t) * lengths[0] + t * lengths[1])
    return np.where(defined, arc, (1 - t) * a + t * b)


def scaled_to(rows: Rows, length: float) -> Rows:
    """Every row at that length; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * np.where(norms > 0, length / np.where(norms > 0, norms, 1), 1))


def without(a: Rows, b: Rows) -> Rows:
    """a with the direction of b's mean taken out of every row."""
    direction = b.mean(axis=0)
    energy = float(direction @ direction)
    return a if energy == 0 else np.asarray(a - np.outer(a @ direction / energy, direction))


def padded(rows: Rows, count: int) -> Rows:
    """Rows of zeros behind, up to `count`; what is more is left out."""
    return np.concatenate([rows, np.zeros((max(count - len(rows), 0), rows.shape[1]))])[:count]


def repeated(rows: Rows, count: int) -> Rows:
    """The rows again and again, up to `count`."""
    return rows[np.arange(count) % len(rows)]


def distinct(rows: Rows, alike: float = ALIKE) -> list[int]:
    """The rows to keep, in order: no zeros, and none whose cosine with an earlier one is above `alike`."""
    table = cosines(rows, rows)
    kept: list[int] = []
    for number in range(len(rows)):
        if rows[number].any() and all(table[number, other] <= alike for other in kept):
            kept.append(number)
    return kept
