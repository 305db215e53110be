from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core import native
from sdops.core.precision import Singles
from sdops.core.product import Product, Term, multiply

WAYS = ["numpy", pytest.param("compiled", marks=pytest.mark.skipif(native.library() is None, reason="no C compiler"))]


def made(product: Product, first: int, count: int, way: str, monkeypatch: pytest.MonkeyPatch) -> Singles:
    out = np.full(count + 2, 7, np.float32)
    with monkeypatch.context() as patched:
        if way == "numpy":
            patched.setattr(native, "product", lambda *_: False)
        multiply(product, first, out[1:-1])
    assert out[0] == out[-1] == 7  # nothing beside what was asked for
    return out[1:-1]


def one_by_one(terms: list[Term], rows: int, columns: int) -> Singles:
    """The formula, in Python's floats."""
    total = np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            products = [
                float(factor) * float(other)
                for start, up, down in terms
                if start <= i < start + len(up)
                for factor, other in zip(up[i - start], down[:, j], strict=True)
            ]
            total[i, j] = reduce(add, products, 0.0)
    return total.reshape(-1)


def only(terms: list[Term]) -> Product:
    return Product(terms[0].down.shape[1], lambda *_: terms)


def term(rng: np.random.Generator, first: int, rows: int, rank: int, columns: int) -> Term:
    up = rng.standard_normal((rows, rank)).astype(np.float32)
    return Term(first, up, rng.standard_normal((rank, columns)).astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32), way=st.sampled_from(["numpy", "compiled"]), data=st.data())
def test_any_elements_are_those_of_the_formula_bit_for_bit(seed: int, way: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.integers(1, [12, 30]))
    terms = []
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, rows))
        terms.append(term(rng, start, int(rng.integers(1, rows - start + 1)), int(rng.integers(1, 20)), columns))
    wanted = one_by_one(terms, rows, columns)
    first = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(1, rows * columns - first))
    if way == "compiled" and native.library() is None:
        return
    with pytest.MonkeyPatch.context() as patched:
        found = made(only(terms), first, count, way, patched)
    assert np.array_equal(found.view(np.uint32), wanted[first : first + count].view(np.uint32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [5, 320, 1000])
@pytest.mark.parametrize("ranks", [(300,), (2040, 20)])
def test_high_ranks(way: str, columns: int, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums in single precision, or in another order, would be off; and beyond what compiled code prepares."""
    terms = [term(np.random.default_rng(3), 2 * i, 9 - 2 * i, rank, columns) for i, rank in enumerate(ranks)]
    wanted = one_by_one(terms, 9, 7 if columns > 7 else columns).reshape(9, -1)
    found = made(only(terms), 0, 9 * columns, way, monkeypatch).reshape(9, columns)
    assert np.array_equal(found[:, : wanted.shape[1]], wanted)
    singles = np.zeros((9, columns), np.float32)
    for first, up, down in terms:
        for factors, row in zip(up.T, down, strict=True):
            singles[first:] += np.multiply.outer(factors, row)
    assert not np.array_equal(found, singles)


def test_the_order_of_terms_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 2^-53, twice: smallest first they make a difference."""
    parts = [
        Term(0, np.full((1, 1), value, np.float32), np.ones((1, 8), np.float32))
        for value in (1.0, 2.0**-53, 2.0**-53, -1.0)
    ]
    for way in ("numpy", "compiled") if native.library() else ("numpy",):
        assert not made(only(parts), 0, 8, way, monkeypatch).any()
        moved = [parts[1], parts[2], parts[0], parts[3]]
        assert (made(only(moved), 0, 8, way, monkeypatch) == 2.0**-52).all()


@pytest.mark.skipif(native.library() is None, reason="no C compiler")
def test_a_rank_beyond_all_sense_takes_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some MB can have it."""
    rank = 1 << 20
    own = Term(0, np.ones((4, rank), np.float32), np.ones((rank, 9), np.float32))
    assert (made(only([own]), 0, 36, "compiled", monkeypatch) == rank).all()
