"""Laws of low-rank approximation; the reference is the SVD in float64 (Eckart and Young)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdops.core import lowrank, ranks
from sdops.core.lowrank import Engine, decompose, inner, of_product, residual

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "root": lambda i: i**-0.5,
    "harmonic": lambda i: 1 / i,
    "square": lambda i: i**-2.0,
    "exponential": lambda i: torch.exp(-i / 64),
    "rank 32 and noise": lambda i: (i <= 32) + 1e-3 * i**-0.1,
    "nearly flat": lambda i: i**-0.1,
    "straight line": lambda i: 1.001 - i / len(i),
    "steep": lambda i: i**-3.0,
    "very steep": lambda i: torch.exp(-i / 4),
    "outliers": lambda i: torch.where(i <= 4, 1e3, 1 / i),
    "signal in noise": lambda i: 1 / i + 0.02 * (1.001 - i / len(i)).sqrt(),
}


def matrix(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix [o, i] with these singular values."""
    random, k = torch.Generator().manual_seed(seed), len(values)
    left = torch.linalg.qr(torch.randn(shape[0], k, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], k, generator=random, dtype=torch.float64)).Q
    made: Tensor = (left * values) @ right.T
    return made


def with_spectrum(name: str, shape: tuple[int, int]) -> Tensor:
    return matrix(shape, SPECTRA[name](torch.arange(1, min(shape) + 1, dtype=torch.float64)))


def optimum(w: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(w.double())[rank:].square().sum().sqrt())


def error(w: Tensor, factors: lowrank.Factors) -> float:
    return float((w.double() - factors.up.double() @ factors.down.double()).norm())


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(320, 320), (640, 320), (256, 1152), (640, 768)])  # one a convolution
def test_auto_is_within_a_thousandth_of_the_optimum(name: str, shape: tuple[int, int]) -> None:
    w = with_spectrum(name, shape).float()
    for rank in (4, 16, 32, 128):
        if optimum(w, rank) < 1e-5 * w.norm():  # as `decompose` says: single precision ends there
            continue
        found = decompose(w, ranks.fixed(rank), guess=rank)
        assert found.up.shape == (shape[0], rank)
        assert found.down.shape == (rank, shape[1])
        assert error(w, found) <= 1.001 * optimum(w, rank)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("engine", ["exact", "gram"])
def test_engines_that_see_all_values_are_exact(name: str, engine: Engine) -> None:
    w = with_spectrum(name, (96, 200))
    for rank in (4, 16, 32):
        assert error(w, decompose(w, ranks.fixed(rank), engine=engine)) <= (1 + 1e-6) * optimum(w, rank)


def test_exact_finds_a_tail_that_is_small_beside_outliers() -> None:
    values = torch.cat([torch.full((4,), 1e4), 1 / torch.arange(1.0, 61.0)]).double()
    w = matrix((64, 90), values)
    assert error(w, decompose(w, ranks.fixed(20), engine="exact")) <= (1 + 1e-6) * optimum(w, 20)


@pytest.mark.parametrize("engine", lowrank.ENGINES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5), (12, 40)])
def test_full_rank_gives_the_matrix_back(engine: Engine, shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = decompose(w, ranks.fixed(min(shape)), engine=engine)
    torch.testing.assert_close(found.up @ found.down, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", lowrank.ENGINES)
def test_a_matrix_of_low_rank_is_found_whole(engine: Engine) -> None:
    w = matrix((200, 150), torch.ones(6, dtype=torch.float64))
    assert error(w, decompose(w, ranks.fixed(16), engine=engine)) < 1e-7
    assert decompose(w, ranks.absolute(1e-6), engine=engine).rank == 6


@pytest.mark.parametrize("engine", lowrank.ENGINES)
def test_zero_has_rank_zero(engine: Engine) -> None:
    found = decompose(torch.zeros(6, 9), ranks.fixed(4), engine=engine)
    assert found.rank == 0
    assert (found.up @ found.down).shape == (6, 9)


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_reported_error_is_the_measured_one(seed: int, rows: int, columns: int, rank: int) -> None:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=random)
    found = decompose(w, ranks.fixed(rank), engine="gram")
    assert math.isclose(found.spectrum.energy, float(w.double().square().sum()), rel_tol=1e-6)
    assert math.isclose(math.sqrt(residual(w, found.up, found.down)), error(w, found), rel_tol=1e-3, abs_tol=2e-5)
    left = found.spectrum.energy - float(found.spectrum.values[: found.rank].square().sum())
    assert math.isclose(math.sqrt(max(left, 0)), error(w, found), rel_tol=1e-3, abs_tol=2e-2)


def test_residual_looks_at_every_row() -> None:
    w = torch.zeros(3000, 700)  # several chunks
    w[2999, 699] = 2
    assert residual(w, torch.zeros(3000, 0), torch.zeros(0, 700)) == 4


def test_balancing_loses_nothing_and_makes_norms_alike() -> None:
    values = 10.0 ** -torch.arange(0, 12, dtype=torch.float64)
    found = decompose(matrix((30, 20), values), ranks.fixed(12), engine="exact")
    ups, downs = found.up.norm(dim=0), found.down.norm(dim=1)
    torch.testing.assert_close(ups * downs, values, rtol=1e-3, atol=0)
    assert (ups / downs).log2().abs().max() <= 1.01
    assert (downs.log2() - downs.log2().round()).abs().max() < 1e-6  # orthonormal rows times powers of two


def test_random_numbers_depend_on_seed_and_name_alone() -> None:
    w = with_spectrum("root", (300, 300)).float()

    def made(seed: int, name: str) -> Tensor:
        return decompose(w, ranks.fixed(8), engine="krylov", guess=8, seed=seed, name=name).up

    assert torch.equal(made(0, "a"), made(0, "a"))
    assert not torch.equal(made(0, "a"), made(0, "b"))
    assert not torch.equal(made(0, "a"), made(1, "a"))


def test_a_wrong_guess_costs_no_accuracy() -> None:
    w = with_spectrum("harmonic", (400, 400)).float()
    for guess in (1, 4, 200):
        found = decompose(w, ranks.fixed(30), guess=guess)
        assert found.rank == 30
        assert error(w, found) <= 1.001 * optimum(w, 30)


def test_a_product_is_resized_exactly() -> None:
    random = torch.Generator().manual_seed(3)
    up, down = torch.randn(60, 12, generator=random), torch.randn(12, 45, generator=random)
    whole = of_product(up, down, ranks.fixed(12))
    torch.testing.assert_close(whole.up @ whole.down, up @ down, rtol=1e-6, atol=1e-5)
    for rank in (1, 5, 11):
        found = of_product(up, down, ranks.fixed(rank))
        assert found.rank == rank
        assert error(up @ down, found) <= (1 + 1e-5) * optimum(up @ down, rank)


def test_a_product_that_repeats_itself_is_trimmed() -> None:
    up, down = torch.randn(40, 5), torch.randn(5, 30)
    found = of_product(torch.cat([up, -up, up], 1), torch.cat([down, down, 3 * down]), ranks.ratio(1e-6))
    assert found.rank == 5
    torch.testing.assert_close(found.up @ found.down, 3 * up @ down, rtol=1e-5, atol=1e-4)


def test_a_product_of_more_columns_than_the_matrix_has() -> None:
    up, down = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    found = of_product(up, down, ranks.fixed(100))
    assert found.rank == 4
    torch.testing.assert_close(found.up @ found.down, up @ down)


def test_inner_product_without_building_the_matrices() -> None:
    a, b = (torch.randn(20, 3), torch.randn(3, 15)), (torch.randn(20, 7), torch.randn(7, 15))
    dense = float(((a[0].double() @ a[1].double()) * (b[0].double() @ b[1].double())).sum())
    assert math.isclose(inner(*a, *b), dense, rel_tol=1e-9, abs_tol=1e-9)
