"""Measures of adapters on their factors: how large, how alike, and signs of a clamped extraction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdops.core.lowrank import inner
from sdops.verbs._adapter_changes import Change, norm_of
from sdops.verbs._adapter_methods import row_space

_FEW = 8  # numbers that reach the largest by chance or by the coarseness of fp16


@dataclass(frozen=True, slots=True)
class Likeness:
    """Two changes D and E of one layer.

    Attributes:
        norms: ||D||_F, ||E||_F.
        inner: <D, E>.
        overlap_in: ||P^T Q||_F^2 / min(rank D, rank E) of orthonormal bases P, Q of the inputs that they react to. At 1
            the smaller space lies within the larger. None where one is dense.
        overlap_out: The same of the outputs that they change.
        chance: What two random spaces of these ranks have on average, of inputs.
    """

    norms: tuple[float, float]
    inner: float
    overlap_in: float | None = None
    overlap_out: float | None = None
    chance: float | None = None

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two; None if one is zero."""
        scale = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.inner / scale)) if scale else None


def likeness(one: Change, other: Change) -> Likeness:
    """Compare two changes of the same rows; no dense matrix is built unless one is dense already."""
    norms = norm_of(one), norm_of(other)
    if one.dense is not None or other.dense is not None:
        return Likeness(norms, float((one.matrix.double() * other.matrix.double()).sum()))
    product = inner(*one.factors, *other.factors)
    if not all(norms):
        return Likeness(norms, product)
    pairs = [tuple(part.double() for part in change.factors) for change in (one, other)]
    inputs = [row_space(up, down) for up, down in pairs]
    outputs = [row_space(down.T, up.T) for up, down in pairs]
    chance = max(space.shape[1] for space in inputs) / inputs[0].shape[0]
    return Likeness(norms, product, _overlap(*inputs), _overlap(*outputs), min(chance, 1.0))


def _overlap(one: Tensor, other: Tensor) -> float:
    return float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])


def cosine_of(found: Mapping[str, Likeness]) -> float | None:
    """Of two adapters as a whole."""
    total = math.fsum(each.inner for each in found.values())
    scale = math.sqrt(math.fsum(e.norms[0] ** 2 for e in found.values()))
    scale *= math.sqrt(math.fsum(e.norms[1] ** 2 for e in found.values()))
    return total / scale if scale else None


def clamped_share(parts: Mapping[str, Tensor]) -> float:
    """Share of a LoRA's numbers that are exactly as large as the largest of them.

    Most programs that extract LoRAs cut `up` and `down` at the 0.99 quantile of both together, which leaves about one
    number in fifty at the bound. Of numbers that nobody cut hardly any but one is there.
    """
    numbers = torch.cat([parts[name].reshape(-1).abs() for name in ("up", "down")])
    top = int((numbers == numbers.max()).sum())
    return top / len(numbers) if top > _FEW and float(numbers.max()) > 0 else 0.0
