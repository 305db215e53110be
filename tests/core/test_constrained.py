"""The closed form: constraints met, rank as many as they are, and no other change that disturbs less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core.constrained import constraint, independent

SIZES = st.tuples(st.integers(1, 8), st.integers(12, 30), st.integers(3, 20), st.integers(0, 1000))


def case(sizes):
    count, width, outputs, seed = sizes
    random = np.random.default_rng(seed)
    kept = random.standard_normal((200, width)) @ np.diag(random.uniform(0.1, 2, width))
    return kept, random.standard_normal((count, width)), random.standard_normal((outputs, count))


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_the_constraint_is_met_with_as_much_rank_as_it_has_rows(sizes):
    kept, rows, missing = case(sizes)
    solved = constraint(kept, rows)
    change = solved.up(missing) @ solved.down
    np.testing.assert_allclose(change @ rows.T, missing, rtol=1e-7, atol=1e-9)
    assert np.linalg.matrix_rank(change) == min(len(rows), len(missing))


@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_no_other_change_disturbs_less(sizes):
    kept, rows, missing = case(sizes)
    solved = constraint(kept, rows)
    change = solved.up(missing) @ solved.down
    random = np.random.default_rng(1)
    other = random.standard_normal(change.shape)
    other -= other @ np.linalg.pinv(rows) @ rows  # keeps the constraint
    for step in (-1e-2, 1e-2):
        moved = np.linalg.norm((change + step * other) @ kept.T)
        assert moved >= np.linalg.norm(change @ kept.T) * (1 - 1e-6)


def test_rows_that_say_nothing_new_are_found():
    random = np.random.default_rng(0)
    rows = random.standard_normal((4, 10))
    rows = np.stack([rows[0], rows[0], rows[1], 2 * rows[0] - rows[1], np.zeros(10), rows[2]])
    assert independent(rows) == [0, 2, 5]


def test_a_singular_gram_is_no_problem():
    rows = np.eye(5)[:2]
    solved = constraint(np.eye(5)[3:], rows)  # nothing is known of the first three directions
    change = solved.up(np.ones((2, 2))) @ solved.down
    assert change @ rows.T == pytest.approx(np.ones((2, 2)))
