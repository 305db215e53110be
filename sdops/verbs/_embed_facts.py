"""What the numbers of an embedding tell: checksum, norms, directions, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.embeddings._types import Embedding, Vectors
from sdops.text import count

Floats = NDArray[np.floating[Any]]

# The median norm of CLIP-L's words; what healthy embeddings have, too. Used where no model is given.
USUAL_NORMS = {"clip_l": 0.39}
LOUD = 4.0  # a norm that many times the usual one, or that part of it, is worth a warning
ALIKE = 0.95  # cosine above which two vectors say one thing
SAME = 0.9999


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the rows of one encoder.

    Attributes:
        norms: Length of each row.
        spreads: Standard deviation of each row's numbers.
        lowest, highest: Of each row's numbers.
        cosine: Mean cosine between two rows; None for one row.
        directions: Effective rank: exp of the entropy of the squared singular values' shares.
    """

    norms: NDArray[np.float64]
    spreads: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    cosine: float | None
    directions: float


def figures(vectors: Vectors) -> Figures:
    """The figures of [n, width]."""
    rows = np.nan_to_num(vectors.values.astype(np.float64), posinf=0.0, neginf=0.0)
    table = cosines(rows, rows)
    others = ~np.eye(len(rows), dtype=bool)
    shares = np.linalg.svd(rows, compute_uv=False) ** 2
    shares = shares[shares > 0] / max(shares.sum(), 1e-300)
    return Figures(
        np.linalg.norm(rows, axis=1),
        rows.std(axis=1),
        rows.min(axis=1),
        rows.max(axis=1),
        float(table[others].mean()) if len(rows) > 1 else None,
        float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
    )


def cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Cosine of every row of a [n, d] with every row of b [m, d]; 0 for rows of zeros. [n, m]"""
    return np.asarray(_unit(a) @ _unit(b).T)


def _unit(rows: Floats) -> NDArray[np.float64]:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1))


def checksum(embedding: Embedding) -> str | None:
    """AUTOMATIC1111's four hexadecimal digits; None where it has none (several encoders, numbers that are none).

    r <- (281 r xor 997 int(100 x)) mod 2^32 over all numbers x in float32; the low 16 bits.
    """
    if len(embedding.vectors) != 1:
        return None
    values = next(iter(embedding.vectors.values())).values.astype(np.float32).reshape(-1) * np.float32(100)
    if not np.isfinite(values).all():
        return None
    result = 0
    for number in np.trunc(values).astype(np.int64).tolist():
        result = (result * 281 ^ number * 997) & 0xFFFFFFFF
    return f"{result & 0xFFFF:04x}"


def health(vectors: Vectors, found: Figures, usual: float | None) -> list[str]:
    """What is odd about the rows of one encoder, one sentence each, without a full stop.

    Args:
        vectors: [n, width].
        found: Their figures.
        usual: The median norm of the vocabulary; None if it is not known.
    """
    odd = []
    broken = int((~np.isfinite(vectors.values)).sum())
    if broken:
        odd.append(f"{count(broken, 'number')} are NaN or infinite")
    empty = [number for number, norm in enumerate(found.norms) if norm == 0]
    if empty:
        odd.append(f"{_rows(empty)} empty: all zeros")
    if usual:
        far = [number for number, norm in enumerate(found.norms) if norm > 0 and not 1 / LOUD < norm / usual < LOUD]
        if far:
            ratios = found.norms[far] / usual
            odd.append(f"{_rows(far)} {_times(ratios.min(), ratios.max())} as long as a word's vector")
    return odd + _relations(vectors)


def _times(low: float, high: float) -> str:
    return f"{low:.3g} times" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g} times"


def _rows(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"vector {numbers[0]} is"
    return f"vectors {', '.join(map(str, numbers[:8]))}{' ...' if len(numbers) > 8 else ''} are"


def _relations(vectors: Vectors) -> list[str]:
    """Rows that say the same, or the opposite."""
    table = np.triu(cosines(np.nan_to_num(vectors.values), np.nan_to_num(vectors.values)), 1)
    same = [f"{a} and {b}" for a, b in np.argwhere(table > ALIKE).tolist()]
    opposite = [f"{a} and {b}" for a, b in np.argwhere(table < -ALIKE).tolist()]
    found = [f"vectors {_few(same)} are nearly the same"] if same else []
    return found + ([f"vectors {_few(opposite)} are each other's negative"] if opposite else [])


def _few(pairs: Sequence[str]) -> str:
    return "; ".join(pairs[:6]) + (f" and {len(pairs) - 6} more pairs" if len(pairs) > 6 else "")


def direction_cosine(a: Vectors, b: Vectors) -> float:
    """Cosine of the mean rows of two embeddings."""
    return float(cosines(a.values.mean(axis=0, keepdims=True), b.values.mean(axis=0, keepdims=True))[0, 0])


def multiple(a: Vectors, b: Vectors) -> float | None:
    """The number s with b = s a, row by row; None if there is none."""
    if a.values.shape != b.values.shape:
        return None
    along = np.diagonal(cosines(a.values, b.values))
    if not (np.all(along > SAME) or np.all(along < -SAME)):
        return None
    x, y = a.values.astype(np.float64), b.values.astype(np.float64)
    scale = float((x * y).sum() / (x * x).sum())
    return scale if np.linalg.norm(y - scale * x) <= 0.02 * np.linalg.norm(y) else None
