"""Measures of differences: against plain numpy, exact zero for equal bytes, the same for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdops.core import compare as module
from sdops.core.compare import Pair, compare, measure
from tests.tiny import Memory, encoded, numbers

FLOATS = ["F16", "BF16", "F32", "F64"]


def pair(x, y, **kwargs) -> Pair:
    return Pair("w", Memory({"x": x}), "x", Memory({"y": y}), "y", **kwargs)


def nothing(nbytes: int) -> None:
    del nbytes


values = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-100, 100, width=16))


@given(values, st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 2**32 - 1))
def test_the_sums_are_those_of_numpy(x, dtype_x, dtype_y, seed):
    y = x + np.random.default_rng(seed).normal(size=x.shape)
    a, b = encoded(x, dtype_x), encoded(y, dtype_y)
    x, y = numbers(a), numbers(b)
    found = measure(pair(a, b))
    assume(not found.same_bytes)  # nothing is measured then
    rounding = len(x) * 2.0**-52
    assert found.square_a == pytest.approx(x @ x, rel=rounding)
    assert found.square_b == pytest.approx(y @ y, rel=rounding)
    assert found.square_change == pytest.approx((y - x) @ (y - x), rel=rounding)
    assert found.product == pytest.approx(x @ y, rel=rounding, abs=rounding * np.abs(x) @ np.abs(y))
    assert found.largest == np.abs(y - x).max()
    assert found.changed == np.count_nonzero(x != y)


@given(values, st.sampled_from(FLOATS))
def test_equal_bytes_are_not_measured(x, dtype):
    found = measure(pair(encoded(x, dtype), encoded(x, dtype)))
    assert (found.same_bytes, found.changed, found.relative, found.elements) == (True, 0, 0.0, len(x))


@given(values)
def test_equal_values_in_another_dtype_are_no_change(x):
    found = measure(pair(encoded(x, "F16"), encoded(numbers(encoded(x, "F16")), "F32")))
    assert (found.same_bytes, found.changed, found.square_change, found.relative) == (False, 0, 0.0, 0.0)


@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-6e4, 6e4)),
    st.sampled_from([("F32", "F16"), ("F64", "F16"), ("F32", "BF16"), ("F64", "F32")]),
)
def test_rounded_is_told_from_changed(x, dtypes):
    wide = encoded(x, dtypes[0])
    narrow = encoded(numbers(wide), dtypes[1])
    assert measure(pair(wide, narrow)).rounded
    assert measure(pair(narrow, wide)).rounded
    other = narrow[1].copy()
    other.view(f"u{other.itemsize}")[-1] ^= 1
    assert not measure(pair(wide, (dtypes[1], other))).rounded


def test_one_dtype_is_never_rounded():
    assert not measure(pair(encoded([1.0], "F16"), encoded([1.001], "F16"))).rounded
    assert not measure(pair(encoded([1.0], "F16"), encoded([1.001], "BF16"))).rounded


def test_known_numbers():
    found = measure(pair(encoded([3.0, 4.0], "F16"), encoded([3.0, 4.5], "F32")))
    assert found.relative == pytest.approx(0.1)
    assert found.cosine == pytest.approx((9 + 18) / (5 * np.sqrt(9 + 4.5**2)))
    assert (found.changed, found.elements, found.largest) == (1, 2, 0.5)
    opposite = measure(pair(encoded([1.0, 2.0], "F16"), encoded([-1.0, -2.0], "F16")))
    assert (opposite.relative, opposite.cosine) == (2.0, pytest.approx(-1))


def test_a_change_from_zero_has_no_relative_size():
    found = measure(pair(encoded([0.0, 0.0], "F16"), encoded([0.0, 1.0], "F16")))
    assert (found.relative, found.cosine, found.largest) == (None, None, 1.0)


def test_minus_zero_is_zero():
    found = measure(pair(encoded([0.0, 1.0], "F32"), encoded([-0.0, 1.0], "F32")))
    assert (found.same_bytes, found.changed) == (False, 0)


def test_nan_and_infinity_stay_out_of_the_sums():
    nan, inf = np.nan, np.inf
    x = ("F32", np.array([nan, 1, inf, 2, nan], np.float32))
    y = ("F32", np.array([nan, 1, 3.0, 5, 0], np.float32))
    found = measure(pair(x, y))
    assert (found.nonfinite, found.changed, found.square_a, found.square_change, found.largest) == (3, 3, 5, 9, 3)


@pytest.mark.parametrize(("dtype", "code"), [("I64", "i8"), ("I32", "i4"), ("U8", "u1"), ("BOOL", "u1")])
def test_integers_are_numbers(dtype, code):
    found = measure(pair((dtype, np.array([1, 2], code)), (dtype, np.array([1, 0], code))))
    assert (found.changed, found.largest, found.relative) == (1, 2, pytest.approx(np.sqrt(4 / 5)))


def test_codes_are_bytes():
    x, y = ("U8", np.array([1, 2, 3], np.uint8)), ("U8", np.array([1, 9, 9], np.uint8))
    found = measure(pair(x, y, codes=True))
    assert (found.changed, found.square_a, found.relative, found.cosine) == (2, 0.0, None, None)
    assert measure(pair(x, x, codes=True)).same_bytes


@pytest.mark.parametrize("where", [0, module.PIECE - 1, module.PIECE, 4 * module.PIECE, 9 * module.PIECE + 4])
def test_a_single_bit_is_found_anywhere(where):
    x = np.ones(9 * module.PIECE + 5, np.float16)
    y = x.copy()
    y.view(np.uint16)[where] ^= 1
    found = measure(pair(("F16", x), ("F16", y)))
    assert (found.changed, found.elements, found.square_a) == (1, len(x), len(x))


def test_empty_tensors_are_the_same():
    assert measure(pair(("F16", np.zeros(0, "f2")), ("F16", np.zeros(0, "f2")))).same_bytes


@pytest.mark.parametrize("fork", [True, False])
def test_any_number_of_workers_finds_the_same(fork, monkeypatch):
    monkeypatch.setattr(module, "FORK_BYTES", 0 if fork else 1 << 60)
    monkeypatch.setattr(module, "can_fork", lambda: fork)
    rng = np.random.default_rng(0)
    a = {f"w{i}": encoded(rng.normal(size=200_000 // (i + 1)), "F16") for i in range(7)}
    b = {key: encoded(numbers(tensor) * 1.01 if key != "w3" else numbers(tensor), "F16") for key, tensor in a.items()}
    one, other = Memory(a), Memory(b)
    work = [Pair(key, one, key, other, key) for key in a]
    read: list[int] = []
    single = compare(work, jobs=1, progress=nothing)
    several = compare(work, jobs=3, progress=read.append)
    assert single == several
    assert list(several) == list(a)
    assert sum(read) == sum(item.nbytes for item in work)
    assert [key for key, found in several.items() if found.same_bytes] == ["w3"]


@pytest.mark.skipif(module._compiled() is None, reason="compiled without a C compiler")
@pytest.mark.parametrize("dtypes", [("F16", "F16"), ("BF16", "F16"), ("F32", "BF16"), ("F32", "F32")])
@pytest.mark.parametrize("count", [1, 7, 513, module.PIECE + 9])
def test_compiled_code_finds_what_numpy_finds(dtypes, count, monkeypatch):
    rng = np.random.default_rng(count)
    x, y = rng.normal(size=count), rng.normal(size=count)
    y[::3] = x[::3]
    if count > 7:
        x[3], y[4], x[5], y[5], x[6], y[6] = np.nan, np.inf, np.inf, np.inf, np.nan, np.nan
    with np.errstate(invalid="ignore"):
        both = pair(encoded(x, dtypes[0]), encoded(y, dtypes[1]))
    compiled = measure(both)
    monkeypatch.setattr(module, "_compiled", lambda: None)
    plain = measure(both)
    assert (compiled.changed, compiled.nonfinite) == (plain.changed, plain.nonfinite)
    assert compiled.largest == plain.largest
    for name in ("square_a", "square_b", "square_change", "product"):
        assert getattr(compiled, name) == pytest.approx(getattr(plain, name), rel=1e-12, abs=1e-12)
