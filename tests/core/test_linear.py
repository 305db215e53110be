"""Coefficients learnt from symbols: exact fractions, rounded once to float32, sums kept."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdops.core.linear import Symbol, coefficients, to_single
from sdops.errors import UsageError

weights = st.floats(-100, 100, width=32)


def single(number: float) -> Fraction:
    return Fraction(float(np.float32(number)))


@given(number=st.floats(-1e30, 1e30))
def test_numbers_become_the_nearest_float32(number: float) -> None:
    assert to_single(number) == single(number)


@pytest.mark.parametrize("number", [1e39, -1e300])
def test_numbers_beyond_float32_are_refused(number: float) -> None:
    with pytest.raises(UsageError, match="too large"):
        to_single(number)


@given(alpha=weights)
def test_a_weighted_sum_adds_up_to_one(alpha: float) -> None:
    a, b = coefficients(lambda a, b, *, alpha: a + alpha * (b - a), 2, {"alpha": alpha})
    assert b == single(alpha)
    assert a == 1 - b


@given(values=st.lists(st.floats(0.01, 10), min_size=2, max_size=8))
def test_a_mean_of_any_number_adds_up_to_one(values: list[float]) -> None:
    def mean(*models, weights):
        return sum(w / sum(weights) * m for w, m in zip(weights, models, strict=True))

    found = coefficients(mean, len(values), {"weights": tuple(values)})
    assert abs(sum(found) - 1) < Fraction(1, 1 << 20)
    thirds = coefficients(lambda *m: sum(m) / len(m), len(values), {})
    assert sum(thirds) == 1
    assert all(c == single(1 / len(values)) for c in thirds[1:])
    assert all(c.denominator & (c.denominator - 1) == 0 for c in (*found, *thirds))


def test_all_that_symbols_can_do() -> None:
    x, y = Symbol({0: Fraction(1)}), Symbol({1: Fraction(1)})
    assert (x - y).terms == {0: 1, 1: -1}
    assert (-x * 0.5).terms == {0: Fraction(-1, 2)}
    assert (3 * (x + y) / 4).terms == {0: Fraction(3, 4), 1: Fraction(3, 4)}
    assert sum([x, y, x]).terms == {0: 2, 1: 1}
    with pytest.raises(TypeError):
        1 + x
    with pytest.raises(TypeError):
        x * y


def test_an_input_that_is_not_used_has_no_weight() -> None:
    assert coefficients(lambda *m: 2 * m[1], 3, {}) == (0, 2, 0)
