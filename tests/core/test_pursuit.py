"""Sparse formulas: what was planted is found, and noise is called noise."""

from __future__ import annotations

import numpy as np
import pytest

from sdops.core.pursuit import Dictionary

RNG = np.random.default_rng(3)
WORDS, WIDTH = 3000, 384


@pytest.fixture(scope="module")
def rows():
    """Words in clusters, as the vocabulary of a text encoder has them, around a common mean."""
    centres = RNG.standard_normal((WORDS // 10, WIDTH))
    mixed = 0.7 * centres[RNG.integers(0, len(centres), WORDS)] + 0.7 * RNG.standard_normal((WORDS, WIDTH))
    return (0.014 * mixed + 0.002 * RNG.standard_normal(WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def dictionary(rows):
    return Dictionary(rows)


@pytest.fixture(scope="module")
def chance(dictionary, rows):
    return dictionary.chance(24, source=rows)


@pytest.mark.parametrize("terms", range(1, 9))
def test_planted_terms_are_found(terms, dictionary, chance, rows):
    for _ in range(3):
        chosen = RNG.choice(WORDS, terms, replace=False)
        planted = RNG.uniform(0.1, 1, terms) * RNG.choice([-1, 1], terms)
        vector = (planted @ rows[chosen].astype(np.float64)).astype(np.float32)
        found = dictionary.explain(vector, 8, chance)
        assert found.exact
        assert sorted(found.rows) == sorted(chosen.tolist())
        expected = dict(zip(chosen.tolist(), planted, strict=True))
        assert found.coefficients == pytest.approx([expected[row] for row in found.rows], abs=1e-4)


def test_planted_terms_are_found_below_noise(dictionary, chance, rows):
    vector = np.array([0.6, 0.3, -0.4]) @ rows[[5, 77, 300]]
    noise = RNG.standard_normal(WIDTH)
    noise *= 0.5 * np.linalg.norm(vector) / np.linalg.norm(noise)
    found = dictionary.explain(vector + noise, 8, chance)
    assert not found.exact
    assert set(found.rows) == {5, 77, 300}
    assert found.explained > found.chance


def test_noise_is_nothing(dictionary, chance, rows):
    spread = rows - rows.mean(axis=0)
    for number in range(20):
        alike = rows.mean(axis=0) + RNG.standard_normal(WORDS) @ spread / np.sqrt(WORDS)
        vector = alike if number % 2 else 0.014 * RNG.standard_normal(WIDTH)
        assert dictionary.explain(vector, 8, chance).rows == []


def test_coefficients_may_be_held_positive(dictionary, rows):
    found = dictionary.explain(0.5 * rows[3] - 0.4 * rows[9], 4, None, positive=True)
    assert min(found.coefficients) > 0
    assert 3 in found.rows


def test_zeros_have_no_terms(dictionary, chance):
    assert dictionary.explain(np.zeros(WIDTH), 8, chance).rows == []
