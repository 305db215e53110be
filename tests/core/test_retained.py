"""How much of a change survives rounding: the formula on known numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from sdops.core.plan import Input, Step
from sdops.core.precision import decode, encode
from sdops.core.retained import SAMPLE, TENSORS, WHOLE, Retained
from sdops.core.spec import Spec
from tests.tiny import Memory, encoded


def step_of(arrays: list[np.ndarray], dtype: str) -> tuple[Step, list[np.ndarray]]:
    sources = [Memory({"w": encoded(array, dtype)}) for array in arrays]
    inputs = tuple(Input(source, "w", index) for index, source in enumerate(sources))
    return Step(Spec(dtype, arrays[0].shape), "merge", inputs), [encode(array, dtype)[0] for array in arrays]


def measure(arrays: list[np.ndarray], weights: list[float], dtype: str = "F16") -> dict[int, float]:
    step, raws = step_of(arrays, dtype)
    total = sum(w * decode(raw, dtype) for w, raw in zip(weights, raws, strict=True))
    retained = Retained(["w"])
    used = {i: Fraction(w) for i, w in enumerate(weights) if w}
    retained.sample_linear(step, raws, used, encode(total, dtype)[0])
    return retained.shares()


NORMAL = [np.random.default_rng(seed).standard_normal(2000) for seed in range(3)]


def test_a_large_change_survives() -> None:
    assert measure(NORMAL[:2], [0.5, 0.5]) == {1: pytest.approx(1, abs=1e-3)}


def test_a_change_below_half_a_unit_is_lost() -> None:
    a = np.full(100, 1.0)
    assert measure([a, a + 2.0**-8], [1 - 2.0**-5, 2.0**-5]) == {1: 0}
    assert measure([a, a + 2.0**-8], [1 - 2.0**-5, 2.0**-5], "F32") == {1: 1}


def test_each_model_has_its_share() -> None:
    a = np.full(100, 1.0)
    shares = measure([a, a + 1, a + 2.0**-8], [1 - 0.25 - 2.0**-5, 0.25, 2.0**-5])
    assert shares[1] == pytest.approx(1, abs=1e-2)
    assert shares[2] == pytest.approx(0, abs=1e-9)
    assert shares[WHOLE] == pytest.approx(1, abs=1e-2)


def test_a_difference_is_measured_as_a_whole() -> None:
    a, far = np.full(100, 1.0), np.full(100, 3.0)
    assert measure([a, far + 2.0**-9, far], [1, 0.125, -0.125]) == {WHOLE: 0}
    assert measure([a, far + 1, far], [1, 0.125, -0.125]) == {WHOLE: 1}


def test_a_sum_that_is_no_average() -> None:
    assert measure([NORMAL[0]], [1.25]) == {WHOLE: pytest.approx(1, abs=1e-3)}
    assert measure(NORMAL, [1, 0.5, 0.5]) == {WHOLE: pytest.approx(1, abs=1e-3)}


def test_nothing_wanted_is_nothing_lost() -> None:
    assert measure([NORMAL[0], NORMAL[0]], [0.5, 0.5]) == {}


def test_other_methods_are_measured_as_a_whole() -> None:
    retained = Retained(["w"])
    first, wanted = np.zeros(4), np.array([1.0, 1.0, 1.0, 1.0])
    retained.sample(first, wanted, np.array([1.0, 1.0, 0.0, 0.0]))
    assert retained.shares() == {WHOLE: 0.5}
    retained.sample(first, wanted, wanted)
    assert retained.shares() == {WHOLE: 0.75}


def test_only_a_sample_is_looked_at() -> None:
    a = np.zeros(SAMPLE + 10)
    b = a.copy()
    b[SAMPLE:] = 1
    assert measure([a, b], [0.5, 0.5]) == {}


def test_of_many_tensors_a_fair_choice_is_looked_at() -> None:
    names = [f"blocks.{i}.{part}.{kind}" for i in range(1000) for part in "qkvo" for kind in ("weight", "bias")]
    retained = Retained(names)
    again = Retained(reversed(names))
    chosen = [name for name in names if retained.wants(name)]
    assert len(chosen) == TENSORS
    assert chosen == [name for name in names if again.wants(name)]
    for text, share in ((".bias", 1 / 2), (".q.", 1 / 4), ("blocks.1", 111 / 1000)):
        assert sum(text in name for name in chosen) / TENSORS == pytest.approx(share, abs=0.05)
    assert all(Retained(names[:100]).wants(name) for name in names[:100])
