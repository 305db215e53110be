"""How many singular values of a matrix to keep: one function per rule, and one for all matrices of a model together.

A rule looks at the leading singular values and answers with a rank, or with None if it cannot tell without more of
them: so an engine that finds the largest values first need not find the others (core.lowrank).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a matrix's singular values.

    Attributes:
        values: The largest ones, descending, float64 [k].
        energy: Sum of the squares of all of them, the squared Frobenius norm.
        shape: (m, n) of the matrix.
    """

    values: Tensor
    energy: float
    shape: tuple[int, int]

    @property
    def complete(self) -> bool:
        """Whether these are all singular values."""
        return len(self.values) == min(self.shape)


Rule = Callable[[Spectrum], int | None]


def fixed(rank: int) -> Rule:
    """r = rank, or all there are."""

    def rule(spectrum: Spectrum) -> int | None:
        wanted = min(rank, *spectrum.shape)
        return wanted if wanted <= len(spectrum.values) else None

    return rule


def energy(share: float) -> Rule:
    """The smallest r with sum_{i<=r} s_i^2 >= share * sum_i s_i^2 (PEFT's `convert_to_lora` with a fraction)."""

    def rule(spectrum: Spectrum) -> int | None:
        wanted = share * spectrum.energy
        if wanted <= 0:
            return 0
        missing = int((spectrum.values.square().cumsum(0) < wanted).sum())
        if missing < len(spectrum.values):
            return missing + 1
        return missing if spectrum.complete else None

    return rule


def frobenius(share: float) -> Rule:
    """The smallest r with ||W_r||_F >= share * ||W||_F (`sv_fro` of kohya's resize script); energy of share^2."""
    return energy(share**2)


def ratio(share: float) -> Rule:
    """All s_i > share * s_1 (`ratio` of LyCORIS; kohya's `sv_ratio` is 1 / share)."""
    return lambda spectrum: _above(spectrum, share * float(spectrum.values[0]) if len(spectrum.values) else 0.0)


def absolute(least: float) -> Rule:
    """All s_i > least (`threshold` of LyCORIS, `sv_epsilon` of mergekit)."""
    return lambda spectrum: _above(spectrum, least)


def quantile(share: float, most: int | None = None) -> Rule:
    """The number of r with sum_{i<=r} s_i < share * sum_i s_i, at least 1: sums of values, not squares (LyCORIS).

    Needs all singular values, also to find that there are more than `most`.
    """

    def rule(spectrum: Spectrum) -> int | None:
        if not spectrum.complete:
            return None
        sums = spectrum.values.cumsum(0)
        wanted = max(int((sums < share * spectrum.values.sum()).sum()), 1)
        return wanted if most is None else min(wanted, most)

    return rule


EDGE_MARGIN = 1.02  # finite matrices exceed the asymptotic edge a little


def noise_floor(least: float, most: float) -> Rule:
    """All s_i > 1.02 sigma (sqrt m + sqrt n): above what rounding noise of standard deviation sigma makes.

    A matrix of independent noise has singular values up to the edge sigma (sqrt m + sqrt n) of the Marchenko-Pastur
    distribution. Rounding to a grid with distance ulp makes noise of variance ulp^2 / 12; the difference of two rounded
    weights has that of one or of both, depending on whether training began from the rounded base. What is left of the
    matrix without its values above the higher edge tells: sigma^2 is its mean square, kept in [least, most].

    Args:
        least: Mean of ulp^2 / 12 of the tuned weight.
        most: The same of both weights, added.
    """

    def rule(spectrum: Spectrum) -> int | None:
        m, n = spectrum.shape
        edge = EDGE_MARGIN * (math.sqrt(m) + math.sqrt(n))
        sure = int((spectrum.values > math.sqrt(most) * edge).sum())
        left = spectrum.energy - float(spectrum.values[:sure].square().sum())
        variance = min(max(left / max((m - sure) * (n - sure), 1), least), most)
        return _above(spectrum, math.sqrt(variance) * edge)

    return rule


def lowest(*rules: Rule) -> Rule:
    """The lowest of what several rules say: `lowest(fixed(64), energy(0.99))` keeps at most 64 values.

    A rule that wants more values than it was shown is no obstacle if another is content with what is there. So
    `quantile` has a cap of its own: it wants to see all values, not to keep them.
    """

    def rule(spectrum: Spectrum) -> int | None:
        said = [wanted for each in rules if (wanted := each(spectrum)) is not None]
        return min(said, default=None)

    return rule


def _above(spectrum: Spectrum, threshold: float) -> int | None:
    count = int((spectrum.values > threshold).sum())
    return count if count < len(spectrum.values) or spectrum.complete else None


class Budget:
    """The ranks of many matrices that together leave the least squared error for a number of parameters.

    Value i of an m x n matrix is worth s_i^2 and costs m + n numbers. Taken in the order of worth per cost (as
    elias-gaeros' resize_lora does by file size), the squared error is the least there is for what was spent; what
    remains of the budget is less than one item. Within a matrix worth falls, so what is taken are its leading values.

    Matrices come one at a time. What was once worth too little stays out, so `floor` tells the next matrix which of its
    values need not be looked for.

    Args:
        numbers: How many numbers all factors together may have.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self._spent = 0
        self._taken: list[tuple[float, int, int, int]] = []  # heap of (worth per cost, -matrix, -index, cost)
        self._refused = (0.0, 0, 0, 0)  # the best item that did not fit
        self._matrices = 0

    def floor(self, cost: int) -> float:
        """Singular values up to this will not be taken from a matrix whose m + n is `cost`."""
        return math.sqrt(self._refused[0] * cost)

    def add(self, values: Sequence[float], cost: int) -> None:
        """Offer the next matrix's leading singular values, descending."""
        for index, value in enumerate(values):
            item = (value**2 / cost, -self._matrices, -index, cost)
            if item > self._refused:
                heapq.heappush(self._taken, item)
                self._spent += cost
            while self._taken and (self._spent > self.numbers or self._taken[0] < self._refused):
                out = heapq.heappop(self._taken)
                self._refused = max(out, self._refused)
                self._spent -= out[3]
        self._matrices += 1

    def ranks(self) -> list[int]:
        """The ranks of the matrices, in the order in which they came."""
        counts = [0] * self._matrices
        for _, matrix, _, _ in self._taken:
            counts[-matrix] += 1
        return counts


def rounding_variance(sum_of_squared_ulps: float, count: int) -> float:
    """Variance of the error of rounding to a grid: mean(ulp^2) / 12 (uniform in [-ulp / 2, ulp / 2])."""
    return sum_of_squared_ulps / max(count, 1) / 12


def squared_ulps(values: Tensor) -> float:
    """Sum over a tensor of the squared distance of neighbouring numbers of its dtype (float16, bfloat16, float32).

    The exponent's bits alone, read as a number, are the power of two below it; ulp is that times eps. Where that gives
    0 (subnormal numbers) the true distance is too small to matter.
    """
    integer, mask = {
        torch.float16: (torch.int16, 0x7C00),
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float32: (torch.int32, 0x7F800000),
    }[values.dtype]
    powers = (values.view(integer) & mask).view(values.dtype).float().reshape(-1)
    return float(powers @ powers) * torch.finfo(values.dtype).eps ** 2
