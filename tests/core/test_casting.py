"""Casts against torch, bit by bit: every 8- and 16-bit number, every neighbourhood of float32; and what saturates."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdops.core import native
from sdops.core.casting import BLOCK, CASTABLE, READABLE, Counts, cast, raw_dtype
from sdops.core.fp8 import fp8_values
from sdops.core.precision import FORMATS, encode

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
LARGEST = {
    "F16": 65504.0,
    "BF16": FORMATS["BF16"].largest,
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    "F32": FORMATS["F32"].largest,
}
NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")


@pytest.fixture(scope="module", params=["compiled", "numpy"], autouse=True)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the compiled code and for numpy."""
    if request.param == "compiled" and native.library() is None:
        pytest.skip("no compiled code: the package was installed without a C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "library", lambda: None)
        yield


def casted(raw: np.ndarray, source: str, target: str, noise: np.ndarray | None = None) -> tuple[np.ndarray, Counts]:
    out = np.empty(len(raw), raw_dtype(target))
    counts = cast(raw, source, out, target, noise)
    return out, counts


def by_torch(raw: np.ndarray, source: str, target: str) -> np.ndarray:
    signed = torch.from_numpy(raw.view(f"i{raw.itemsize}").copy())
    out = signed.view(TORCH[source]).to(TORCH[target])
    return (
        out.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[out.itemsize])
        .numpy()
        .view(raw_dtype(target))
    )


def values(raw: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(raw.view(f"i{raw.itemsize}").copy()).view(TORCH[dtype]).double().numpy()


def check(raw: np.ndarray, source: str, target: str) -> None:
    out, counts = casted(raw, source, target)
    expected = by_torch(raw, source, target)
    before, theirs, ours = values(raw, source), values(expected, target), values(out, target)
    finite = np.isfinite(before) & np.isfinite(theirs)
    if target in LARGEST:  # torch lets e4m3 saturate, too
        finite &= (np.abs(theirs) < LARGEST[target]) | (np.abs(before) <= LARGEST[target])
    np.testing.assert_array_equal(out[finite], expected[finite])
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(before))
    np.testing.assert_array_equal(np.signbit(ours)[~np.isnan(before)], np.signbit(before)[~np.isnan(before)])
    over = np.isfinite(before) & np.isinf(theirs)
    if target != "F64":
        np.testing.assert_array_equal(np.abs(ours[over]), LARGEST[target])
    if target not in ("F8_E4M3", "F64"):
        assert counts.overflow == over.sum()
    assert (counts.nan, counts.infinite) == (np.isnan(before).sum(), np.isinf(before).sum())
    expected_infinity = 448.0 if target == "F8_E4M3" else np.inf
    np.testing.assert_array_equal(np.abs(ours[np.isinf(before)]), expected_infinity)


@pytest.mark.parametrize("target", sorted(CASTABLE))
@pytest.mark.parametrize("source", sorted(READABLE - {"F32", "F64"}))
def test_every_number_of_the_narrow_dtypes(source, target):
    check(np.arange(1 << 8 * raw_dtype(source).itemsize, dtype=raw_dtype(source)), source, target)


def dense_singles() -> np.ndarray:
    """Around every number of 11 leading bits of fraction: ties, their neighbours, subnormals, the ends of the range."""
    top = np.arange(1 << 20, dtype=np.uint32) << np.uint32(12)
    return np.concatenate([top, top - np.uint32(1), top + np.uint32(1)])


@pytest.mark.parametrize("target", [*NARROW, "F32", "F64"])
def test_dense_singles(target):
    check(dense_singles(), "F32", target)


@pytest.mark.parametrize("target", [*NARROW, "F32"])
def test_doubles_are_rounded_once(target):
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-30, 20, 50_000)
    plain = rng.standard_normal(50_000) * scale
    grid = values(np.arange(65536, dtype=np.uint16), "F16")
    grid = np.sort(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    near = np.concatenate([ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40), plain, [1e200, -1e200, 5e-324]])
    out, counts = casted(near.view(np.uint64), "F64", target)
    if target in ("F16", "BF16", "F32"):
        expected, overflow = encode(near, target)
        np.testing.assert_array_equal(out, expected)
        assert counts.overflow == overflow
    else:
        candidates = fp8_values(target).astype(np.float64)
        candidates = np.unique(candidates[np.isfinite(candidates)])
        right = np.searchsorted(candidates, near).clip(1, len(candidates) - 1)
        low, high = candidates[right - 1], candidates[right]
        inside = (near >= candidates[0]) & (near <= candidates[-1])
        ours = values(out, target)[inside]
        distance = np.abs(ours - near[inside])
        assert (distance <= np.minimum(near - low, high - near)[inside] + 0).all()


@pytest.mark.parametrize(
    ("target", "at", "counted"),
    [
        ("F16", 65519.0, 0),
        ("F16", 65520.0, 1),
        ("F8_E4M3", 464.0, 0),
        ("F8_E4M3", 464.25, 1),
        ("F8_E5M2", 61439.0, 0),
        ("F8_E5M2", 61440.0, 1),
    ],
)
def test_where_overflow_begins(target, at, counted):
    raw = np.array([at, -at, 1], np.float32).view(np.uint32)
    out, counts = casted(raw, "F32", target)
    assert counts == Counts(2 * counted, 0, 0)
    assert values(out, target).tolist() == [LARGEST[target], -LARGEST[target], 1]


@pytest.mark.parametrize("source", ["F32", "F64", "F16"])
@pytest.mark.parametrize("target", NARROW)
def test_random_rounding_goes_to_a_neighbour_and_is_right_on_average(source, target):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(400).astype(np.float16).astype(np.float64) * 2.0 ** rng.integers(-8, 3, 400)
    x = values(casted(x.view(np.uint64), "F64", source)[0], source)
    count = 4000
    raw = np.repeat(casted(x.view(np.uint64), "F64", source)[0], count)
    noise = rng.integers(0, 1 << 32, len(raw), dtype=np.uint32)
    rounded = values(casted(raw, source, target, noise)[0], target).reshape(-1, count)
    low, high = rounded.min(1), rounded.max(1)
    assert (low <= x).all()
    assert (x <= high).all()
    nearest = values(casted(raw, source, target)[0], target).reshape(-1, count)[:, 0]
    assert ((nearest == low) | (nearest == high)).all()
    assert all(len(np.unique(row)) <= 2 for row in rounded)
    step = np.maximum(high - low, 0)
    assert (np.abs(rounded.mean(1) - x) <= 5 * step / 2 / np.sqrt(count)).all()
    exact = nearest == x
    assert (low[exact] == high[exact]).all()


def test_blocks_and_views_do_not_matter():
    rng = np.random.default_rng(2)
    x = rng.standard_normal(2 * BLOCK + 77).astype(np.float32).view(np.uint32)
    whole, _ = casted(x, "F32", "F16")
    parts = np.concatenate([casted(x[i : i + 1001], "F32", "F16")[0] for i in range(0, len(x), 1001)])
    np.testing.assert_array_equal(whole, parts)
    assert casted(x[:0], "F32", "F16")[1] == Counts()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_value_of_fp8_is_nearer(x):
    for target in ("F8_E4M3", "F8_E5M2"):
        out, _ = casted(np.array([x], np.float32).view(np.uint32), "F32", target)
        grid = [Fraction(float(v)) for v in fp8_values(target) if np.isfinite(v)]
        error = abs(Fraction(float(fp8_values(target)[out[0]])) - Fraction(x))
        assert error == min(abs(v - Fraction(x)) for v in grid)
