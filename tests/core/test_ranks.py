"""Rank rules against their formulas, the noise floor against known ranks, the budget against all possibilities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdops.core import ranks
from sdops.core.lowrank import decompose
from sdops.core.ranks import Budget, Spectrum, noise_floor, rounding_variance, squared_ulps

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
WHOLE = Spectrum(VALUES, 85.0, (4, 9))
LEADING = Spectrum(VALUES[:2], 85.0, (4, 9))


@pytest.mark.parametrize(
    ("rule", "whole", "leading"),
    [
        (ranks.fixed(2), 2, 2),
        (ranks.fixed(3), 3, None),
        (ranks.fixed(99), 4, None),
        (ranks.energy(0.75), 1, 1),
        (ranks.energy(0.76), 2, 2),
        (ranks.energy(0.99), 4, None),
        (ranks.energy(0.0), 0, 0),
        (ranks.energy(1.0), 4, None),
        (ranks.frobenius(math.sqrt(0.76)), 2, 2),
        (ranks.ratio(0.5), 1, 1),
        (ranks.ratio(0.2), 3, None),
        (ranks.absolute(4.0), 1, 1),
        (ranks.absolute(3.0), 2, None),
        (ranks.absolute(9.0), 0, 0),
        (ranks.quantile(0.9), 2, None),
        (ranks.quantile(0.1), 1, None),
        (ranks.quantile(0.99, most=1), 1, None),
        (ranks.lowest(ranks.fixed(2), ranks.absolute(0.5)), 2, 2),
        (ranks.lowest(ranks.fixed(3), ranks.absolute(0.5)), 3, None),
        (ranks.lowest(ranks.fixed(1), ranks.absolute(5.0)), 1, 1),
    ],
)
def test_rules(rule: ranks.Rule, whole: int, leading: int | None) -> None:
    assert rule(WHOLE) == whole
    assert rule(LEADING) == leading


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(0, 1))
def test_energy_is_the_smallest_rank_that_suffices(values: list[float], share: float) -> None:
    known = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float(known.square().sum())
    rank = ranks.energy(share)(Spectrum(known, total, (12, len(values))))
    assert rank is not None
    captured = [float(known[:r].square().sum()) for r in range(len(values) + 1)]
    assert captured[rank] >= share * total * (1 - 1e-12)
    assert rank == 0 or captured[rank - 1] < share * total * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_makes_the_predicted_noise(dtype: torch.dtype) -> None:
    weights = 0.03 * torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = weights.to(dtype)
    measured = float((rounded.double() - weights).square().mean())
    assert math.isclose(rounding_variance(squared_ulps(rounded), rounded.numel()), measured, rel_tol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(320, 320), (320, 768), (640, 320)])
@pytest.mark.parametrize("rounded_base", [True, False])
def test_noise_floor_finds_the_true_rank(dtype: torch.dtype, shape: tuple[int, int], rounded_base: bool) -> None:
    """Rank 16 whose smallest value is 1.5 times the edge, far below what 99 % of the energy would keep."""
    random = torch.Generator().manual_seed(7)
    master = 0.03 * torch.randn(shape, generator=random)
    base = master.to(dtype)
    noise = rounding_variance(squared_ulps(base), base.numel())
    edge = math.sqrt(noise * (1 if rounded_base else 2)) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    left = torch.linalg.qr(torch.randn(shape[0], 16, generator=random)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 16, generator=random)).Q
    signal = (left * torch.linspace(6 * edge, 1.5 * edge, 16)) @ right.T
    tuned = ((base.float() if rounded_base else master) + signal).to(dtype)
    difference = tuned.float() - base.float()
    least = rounding_variance(squared_ulps(tuned), tuned.numel())
    found = decompose(difference, noise_floor(least, least + noise))
    assert found.rank == 16
    assert decompose(difference, ranks.energy(0.99)).rank > 30


def test_noise_alone_has_rank_zero() -> None:
    master = 0.03 * torch.randn(320, 320, generator=torch.Generator().manual_seed(2))
    first, second = master.half(), (master * (1 + 1e-4)).half()
    least = rounding_variance(squared_ulps(second), second.numel())
    noise = noise_floor(least, least + rounding_variance(squared_ulps(first), first.numel()))
    assert torch.count_nonzero(second.float() - first.float()) > 1000
    assert decompose(second.float() - first.float(), noise).rank == 0


spectra = st.lists(
    st.tuples(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(2, 9)), min_size=1, max_size=3
)


@given(spectra, st.integers(0, 60))
def test_budget_is_optimal_up_to_one_item(models: list[tuple[list[float], int]], numbers: int) -> None:
    models = [(sorted(values, reverse=True), cost) for values, cost in models]
    budget = Budget(numbers)
    for values, cost in models:
        budget.add(values, cost)
    chosen = budget.ranks()

    def worth(counts: tuple[int, ...]) -> float:
        return sum(v**2 for (values, _), r in zip(models, counts, strict=True) for v in values[:r])

    def spent(counts: tuple[int, ...]) -> int:
        return sum(cost * r for (_, cost), r in zip(models, counts, strict=True))

    every = list(itertools.product(*(range(len(values) + 1) for values, _ in models)))
    assert spent(tuple(chosen)) <= numbers
    best = max(worth(counts) for counts in every if spent(counts) <= numbers)
    largest = max(values[0] ** 2 for values, _ in models)
    assert worth(tuple(chosen)) >= best - largest - 1e-9
    as_good = max(worth(counts) for counts in every if spent(counts) <= spent(tuple(chosen)))
    assert math.isclose(worth(tuple(chosen)), as_good, rel_tol=1e-9, abs_tol=1e-9)
    if len({cost for _, cost in models}) == 1 and len({v for values, _ in models for v in values}) > 1:
        assert math.isclose(worth(tuple(chosen)), best, rel_tol=1e-9, abs_tol=1e-9)


@given(spectra, st.integers(0, 60))
def test_values_below_the_floor_are_never_taken(models: list[tuple[list[float], int]], numbers: int) -> None:
    models = [(sorted(values, reverse=True), cost) for values, cost in models]
    whole, short = Budget(numbers), Budget(numbers)
    for values, cost in models:
        whole.add(values, cost)
        short.add([v for v in values if v > short.floor(cost)], cost)
    assert whole.ranks() == short.ranks()
