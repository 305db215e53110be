"""Sparse approximation: which few rows of a dictionary add up to a vector, and whether that could be chance. numpy.

Orthogonal matching pursuit (Pati, Rezaiifar, Krishnaprasad 1993): take the row a of greatest |<a, r>| / |a|, project
the residual r away from it, repeat. What is taken too early, as it lies between two rows that belong there, is dropped
again once the rest is exact. In hundreds of dimensions tens of thousands of rows explain a good part of anything; so
the gain of every step is compared with the gain on random vectors of the dictionary's own mean and covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.precision import Doubles, Singles

EXACT = 1e-5  # a residual of this part of the vector is rounding
REAL = 4.0  # standard deviations above chance from which a term counts
_BLOCK = 8192  # rows of the dictionary at once


@dataclass(frozen=True, slots=True)
class Pursuit:
    """The steps towards one vector.

    Attributes:
        chosen: Rows of the dictionary, in the order in which they were taken.
        energies: Share of the vector's energy that is left: before the first step, after it ...
    """

    chosen: NDArray[np.intp]  # [steps]
    energies: Doubles  # [steps + 1]

    @property
    def gains(self) -> Doubles:
        """Share of what was left that each step explains. [steps]"""
        before = np.maximum(self.energies[:-1], 1e-300)
        return np.asarray(1 - self.energies[1:] / before)


@dataclass(frozen=True, slots=True)
class Chance:
    """What pursuit achieves on random vectors.

    Attributes:
        explained: Mean share of energy explained after 1, 2 ... steps. [steps]
        gain_mean, gain_deviation: Of the gain of each step. [steps]
    """

    explained: Doubles
    gain_mean: Doubles
    gain_deviation: Doubles

    def scores(self, found: Pursuit) -> Doubles:
        """Standard deviations by which each step is better than chance, as far as chance was tried. [steps]"""
        steps = min(len(found.gains), len(self.gain_mean))
        return np.asarray((found.gains[:steps] - self.gain_mean[:steps]) / self.gain_deviation[:steps])


@dataclass(frozen=True, slots=True)
class Formula:
    """A vector as a sum.

    Attributes:
        rows: Of the dictionary.
        coefficients: One each.
        explained: Share of the vector's energy (R^2).
        exact: Whether nothing but rounding is left.
        scores: Of the pursuit's steps, see `Chance.scores`; empty without calibration.
        chance: Share of energy that as many terms explain of random vectors; None without calibration.
    """

    rows: list[int]
    coefficients: list[float]
    explained: float
    exact: bool
    scores: list[float]
    chance: float | None


class Dictionary:
    """Rows that vectors are made of.

    Args:
        rows: [V, d]; rows of zeros are never taken.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows: Singles = np.ascontiguousarray(rows, np.float32)
        norms = np.sqrt(np.concatenate([np.einsum("ij,ij->i", b, b) for b in _blocks(self.rows)]))
        self._scale = np.where(norms > 0, 1 / np.maximum(norms, 1e-30), 0).astype(np.float32)

    def explain(self, vector: NDArray[Any], terms: int, chance: Chance | None, *, positive: bool = False) -> Formula:
        """The formula of at most `terms` terms for a vector [d]; without `chance`, all of them are kept."""
        vector = vector.astype(np.float64)
        found = self.pursue(vector[None], 3 * terms, positive=positive)[0]
        rows = self._sparsest(vector, found.chosen.tolist()) if found.energies[-1] < EXACT**2 else []
        scores = chance.scores(found).tolist() if chance else []
        exact = 0 < len(rows) <= terms
        if not exact:
            real = max((k + 1 for k, score in enumerate(scores[:terms]) if score >= REAL), default=0)
            rows = found.chosen[: real if chance else terms].tolist()
        coefficients, left = self._fit(vector, rows)
        expected = float(chance.explained[len(rows) - 1]) if chance and rows else 0.0 if chance else None
        return Formula(rows, coefficients.tolist(), 1 - left, exact, scores[:terms], expected)

    def pursue(self, vectors: Doubles, steps: int, *, positive: bool = False) -> list[Pursuit]:
        """Orthogonal matching pursuit of each of the vectors [n, d].

        Args:
            vectors: What is to be explained.
            steps: At most so many; fewer once nothing is left.
            positive: Take only rows that point along the residual, and let no coefficient be negative.
        """
        states = [_State(vector, self.rows, positive=positive) for vector in vectors]
        for _ in range(min(steps, len(self.rows), vectors.shape[1])):
            active = [state for state in states if state.left > EXACT**2 / 100]
            if not active:
                break
            inner = self._inner(np.stack([state.residual for state in active]))  # [V, n]
            for index, state in enumerate(active):
                state.take(inner[:, index])
        return [Pursuit(np.array(state.chosen, np.intp), np.array(state.energies)) for state in states]

    def chance(self, steps: int, *, source: NDArray[Any], draws: int = 64, positive: bool = False) -> Chance:
        """What pursuit achieves on vectors drawn with the mean and the covariance of `source` [*, d]."""
        random = np.random.default_rng(0)
        mean = source.mean(axis=0, dtype=np.float64)
        drawn = np.zeros((draws, source.shape[1]))
        for block in _blocks(source):
            drawn += random.standard_normal((draws, len(block)), np.float32) @ (block - mean.astype(np.float32))
        found = self.pursue(mean + drawn / np.sqrt(len(source)), steps, positive=positive)
        length = min(len(one.chosen) for one in found)
        gains = np.stack([one.gains[:length] for one in found])
        left = np.stack([one.energies[1 : length + 1] for one in found])
        return Chance(1 - left.mean(axis=0), gains.mean(axis=0), np.maximum(gains.std(axis=0), 1e-6))

    def _inner(self, residuals: Doubles) -> Singles:
        """<a, r> / |a| for all rows a and residuals r. [V, n]"""
        narrow = residuals.astype(np.float32).T
        return np.concatenate([block @ narrow for block in _blocks(self.rows)]) * self._scale[:, None]

    def _fit(self, vector: Doubles, rows: list[int]) -> tuple[Doubles, float]:
        """Least squares: coefficients, and the share of energy that is left."""
        energy = float(vector @ vector)
        if not rows or energy == 0:
            return np.zeros(0), 1.0 if energy else 0.0
        atoms = self.rows[rows].astype(np.float64)
        coefficients: Doubles = np.linalg.lstsq(atoms.T, vector, rcond=None)[0].astype(np.float64)
        rest = vector - coefficients @ atoms
        return coefficients, float(rest @ rest) / energy

    def _sparsest(self, vector: Doubles, rows: list[int]) -> list[int]:
        """Rows without those that the vector can do without."""
        while len(rows) > 1:
            coefficients, _ = self._fit(vector, rows)
            parts = np.abs(coefficients) / self._scale[rows]
            fewer = [row for index, row in enumerate(rows) if index != int(parts.argmin())]
            if self._fit(vector, fewer)[1] > EXACT**2:
                return rows
            rows = fewer
        return rows


class _State:
    """One vector on its way."""

    def __init__(self, vector: Doubles, atoms: Singles, *, positive: bool) -> None:
        self._vector, self._atoms, self._positive = vector, atoms, positive
        self._energy = float(vector @ vector)
        self._basis: list[Doubles] = []
        self.residual = vector.copy()
        self.chosen: list[int] = []
        self.energies = [1.0 if self._energy else 0.0]

    @property
    def left(self) -> float:
        """Share of the energy."""
        return self.energies[-1]

    def take(self, inner: Singles) -> None:
        """Take the best row that was not taken yet."""
        inner = inner.copy() if self._positive else np.abs(inner)
        inner[self.chosen] = -np.inf
        best = int(inner.argmax())
        self.chosen.append(best)
        if self._positive:
            self._refit()
        else:
            self._project(self._atoms[best].astype(np.float64))
        self.energies.append(min(float(self.residual @ self.residual) / self._energy, self.left))

    def _project(self, atom: Doubles) -> None:
        """Away from the row; orthogonalised twice, which is enough for full precision."""
        length = np.linalg.norm(atom)
        for _ in range(2):
            for basis in self._basis:
                atom = atom - (basis @ atom) * basis
        norm = np.linalg.norm(atom)
        if norm > 1e-9 * length:
            self._basis.append(atom / norm)
            self.residual = self.residual - (self._basis[-1] @ self.residual) * self._basis[-1]

    def _refit(self) -> None:
        """Least squares without negative coefficients: what becomes negative is let go, worst first."""
        rows = list(self.chosen)
        while rows:
            atoms = self._atoms[rows].astype(np.float64)
            coefficients = np.linalg.lstsq(atoms.T, self._vector, rcond=None)[0]
            if coefficients.min() >= 0:
                self.residual = self._vector - coefficients @ atoms
                return
            rows.pop(int(coefficients.argmin()))


def _blocks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    return [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
