"""core.exact against rational arithmetic: every bit, every dtype, ties, subnormals, overflow."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core import native
from sdops.core.exact import PIECE, ExactSum, NonFiniteError, Scratch
from sdops.core.precision import FORMATS, decode, encode

HALVES = ["F16", "BF16"]
SCRATCH = Scratch()


@pytest.fixture(scope="module", params=["compiled", "numpy"], autouse=True)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the compiled code and for numpy."""
    if request.param == "compiled" and native.library() is None:
        pytest.skip("no compiled code: the package was installed without a C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "library", lambda: None)
        yield


def nearest(exact: Fraction, dtype: str) -> tuple[float, bool]:
    """The value of the format nearest to a rational number, ties to even; clamped, and whether it was."""
    target = FORMATS[dtype]
    magnitude = abs(exact)
    exponent = target.min_exponent
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    unit = Fraction(2) ** (exponent - target.mantissa)
    count, rest = divmod(magnitude, unit)
    if rest > unit / 2 or (rest == unit / 2 and count % 2):
        count += 1
    value = count * unit
    overflow = value > Fraction(target.largest)
    result = float(min(value, Fraction(target.largest)))
    return (-result if exact < 0 else result), overflow


def oracle(
    coefficients: list[Fraction], raws: list[np.ndarray], dtypes: list[str], out: str
) -> tuple[list[float], int]:
    values = [decode(raw, dtype) for raw, dtype in zip(raws, dtypes, strict=True)]
    rounded = [
        nearest(sum((c * Fraction(float(v[i])) for c, v in zip(coefficients, values, strict=True)), Fraction(0)), out)
        for i in range(len(raws[0]))
    ]
    return [value for value, _ in rounded], sum(overflow for _, overflow in rounded)


def check(coefficients: list[Fraction], raws: list[np.ndarray], dtypes: list[str], out_dtype: str) -> None:
    out = np.empty(len(raws[0]), FORMATS[out_dtype].raw)
    overflow = ExactSum(coefficients, dtypes, out_dtype)(raws, out, SCRATCH)
    expected, expected_overflow = oracle(coefficients, raws, dtypes, out_dtype)
    assert decode(out, out_dtype).tolist() == expected
    assert overflow == expected_overflow


def weights(alpha: float) -> list[Fraction]:
    exact = Fraction(float(np.float32(alpha)))
    return [1 - exact, exact]


def neighbours(draw_bits: np.ndarray, steps: np.ndarray, dtype: str) -> np.ndarray:
    """Values a few units in the last place away from the given bit patterns, finite."""
    target = FORMATS[dtype]
    magnitude = np.clip((draw_bits & (target.sign - 1)).astype(np.int64) + steps, 0, target.infinity - 1)
    return (magnitude.astype(target.raw) | (draw_bits & target.raw(target.sign))).astype(target.raw)


finite_alpha = st.one_of(
    st.sampled_from([0.5, 0.25, 0.3, 0.1, 0.7, 0.9, 0.01, 0.0005, 1.5, -0.5, 1 / 3]),
    st.floats(-2, 2, width=32).filter(lambda x: x not in (0, 1)),
)


@pytest.mark.parametrize("dtype", [*HALVES, "F32"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), alpha=finite_alpha, spread=st.sampled_from([4, 40, 2000]))
def test_pairs_a_few_ulps_apart(dtype: str, data: st.DataObject, alpha: float, spread: int) -> None:
    target = FORMATS[dtype]
    seed = data.draw(st.integers(0, 2**32))
    top = data.draw(st.sampled_from([0.02, 1.0, 3e4, 1e-6]))
    rng = np.random.default_rng(seed)
    values = np.concatenate(
        [np.clip(rng.standard_normal(24) * top, -65504, 65504), [0.0, -0.0, 2.0**target.min_exponent]]
    )
    a = (
        values.astype(np.float16).view(np.uint16)
        if dtype == "F16"
        else (values.astype(np.float32).view(np.uint32) >> (16 if dtype == "BF16" else 0)).astype(target.raw)
    )
    a = neighbours(a, np.zeros(len(a), np.int64), dtype)
    b = neighbours(a, rng.integers(-spread, spread + 1, len(a)), dtype)
    check(weights(alpha), [a, b], [dtype, dtype], dtype)


@pytest.mark.parametrize("dtype", [*HALVES, "F32"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), alpha=finite_alpha)
def test_any_finite_bits(dtype: str, data: st.DataObject, alpha: float) -> None:
    target = FORMATS[dtype]
    bits = st.lists(st.integers(0, 2 * target.sign - 1), min_size=8, max_size=8)
    raws = [
        neighbours(np.array(data.draw(bits), target.raw), np.zeros(8, np.int64), dtype) for _ in range(2)
    ]  # clips infinities and NaN to the largest finite value
    check(weights(alpha), raws, [dtype, dtype], dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dtypes=st.lists(st.sampled_from(["F16", "BF16", "F32"]), min_size=1, max_size=5),
    out_dtype=st.sampled_from(["F16", "BF16", "F32"]),
)
def test_many_models_of_mixed_dtypes(seed: int, dtypes: list[str], out_dtype: str) -> None:
    rng = np.random.default_rng(seed)
    values = [(rng.standard_normal(16) * 0.05).astype(np.float32) for _ in dtypes]
    raws = [
        v.astype(np.float16).view(np.uint16)
        if dtype == "F16"
        else (v.view(np.uint32) >> (16 if dtype == "BF16" else 0)).astype(FORMATS[dtype].raw)
        for v, dtype in zip(values, dtypes, strict=True)
    ]
    coefficients = [Fraction(float(np.float32(c))) for c in rng.uniform(-1, 1, len(dtypes))]
    check(coefficients, raws, dtypes, out_dtype)


@pytest.mark.parametrize("dtype", [*HALVES, "F32"])
@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.0005])
def test_fast_and_compensated_sums_agree_bit_for_bit(dtype: str, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a32 = (rng.standard_normal(PIECE) * 0.02).astype(np.float32)
    b32 = (a32 + rng.standard_normal(PIECE) * 0.002).astype(np.float32)
    if dtype == "F16":
        raws = [x.astype(np.float16).view(np.uint16) for x in (a32, b32)]
    else:
        raws = [(x.view(np.uint32) >> (16 if dtype == "BF16" else 0)).astype(FORMATS[dtype].raw) for x in (a32, b32)]
    combine = ExactSum(weights(alpha), [dtype, dtype], dtype)
    fast = np.empty(PIECE, FORMATS[dtype].raw)
    combine(raws, fast, SCRATCH)
    combine.native = None  # what follows are numpy's ways
    plain = np.empty_like(fast)
    combine(raws, plain, SCRATCH)
    with_ties = np.empty_like(fast)
    monkeypatch.setattr(ExactSum, "_ties_impossible", lambda *_: False)
    combine(raws, with_ties, SCRATCH)
    inexact = np.empty_like(fast)
    combine.short_coefficients = combine.all_halves = False
    combine(raws, inexact, SCRATCH)
    compensated = np.empty_like(fast)
    combine._compensated(raws, compensated, SCRATCH)
    assert np.array_equal(fast, plain)
    assert np.array_equal(fast, with_ties)
    assert np.array_equal(fast, inexact)
    assert np.array_equal(fast, compensated)


def test_plain_float32_arithmetic_would_fail_this_test() -> None:
    rng = np.random.default_rng(2)
    a = (rng.standard_normal(4000) * 0.02).astype(np.float16)
    b = neighbours(a.view(np.uint16), rng.integers(-20, 21, len(a)), "F16").view(np.float16)
    single = (a.astype(np.float32) + np.float32(0.3) * (b.astype(np.float32) - a.astype(np.float32))).astype(np.float16)
    expected, _ = oracle(weights(0.3), [a.view(np.uint16), b.view(np.uint16)], ["F16", "F16"], "F16")
    assert np.count_nonzero(single.astype(np.float64) != expected) > 0


def test_sums_beyond_twice_the_precision_of_float64() -> None:
    """2**100 + 2**-40 + 2**-140: only rational arithmetic sees the last term, and it decides a tie."""
    values = [np.float32(2.0**100), np.float32(2.0**76), np.float32(2.0**-140)]
    raws = [np.array([v]).view(np.uint32) for v in values]
    for sign in (1, -1):
        check([Fraction(1), Fraction(1), Fraction(sign)], raws, ["F32"] * 3, "F32")


@pytest.mark.parametrize("out_dtype", [*HALVES, "F32"])
@pytest.mark.parametrize("power", [-20, -45, -60, -139])
def test_small_shares_of_large_numbers(out_dtype: str, power: int) -> None:
    """Such as come of models without a common scale; in numpy's units these shares would be too small for float64."""
    rng = np.random.default_rng(-power)
    shares = [Fraction(float(np.float32(0.3 * 2.0**power))), Fraction(1)]
    large, small = rng.standard_normal(64) * 2.0 ** (-8 - power), rng.standard_normal(64)
    raws = [np.clip(x, -3e38, 3e38).astype(np.float32).view(np.uint32) for x in (large, small)]
    check(shares, raws, ["F32", "F32"], out_dtype)


def test_double_precision_is_nearest() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal(64), rng.standard_normal(64)
    out = np.empty(64, np.uint64)
    ExactSum(weights(0.3), ["F64", "F64"], "F64")([a.view(np.uint64), b.view(np.uint64)], out, SCRATCH)
    c0, c1 = weights(0.3)
    expected = [float(c0 * Fraction(x) + c1 * Fraction(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert out.view(np.float64).tolist() == expected


@pytest.mark.parametrize("dtype", [*HALVES, "F32"])
@pytest.mark.parametrize("offset", [0, 1])
def test_nan_and_infinity_are_named(dtype: str, offset: int) -> None:
    target = FORMATS[dtype]
    good = np.zeros(4, target.raw)
    for negative in (0, target.sign):
        bad = good.copy()
        bad[2] = target.infinity + offset + negative
        with pytest.raises(NonFiniteError) as caught:
            ExactSum(weights(0.5), [dtype, dtype], dtype)([good, bad], good.copy(), SCRATCH)
        assert caught.value.index == 1


def test_a_sum_of_nothing() -> None:
    out = np.ones(3, np.uint16)
    assert ExactSum([], [], "F16")([], out, Scratch()) == 0
    assert not out.any()


def test_empty_piece() -> None:
    empty = np.zeros(0, np.uint16)
    assert ExactSum(weights(0.5), ["F16", "F16"], "F16")([empty, empty], empty.copy(), SCRATCH) == 0


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.0005])
@pytest.mark.parametrize("dtype", HALVES)
def test_negative_zero_survives_every_path(dtype: str, alpha: float) -> None:
    zeros = np.array([0x8000, 0x0000], np.uint16)
    combine = ExactSum(weights(alpha), [dtype, dtype], dtype)
    for path in (combine, combine._compensated):
        out = np.empty(2, np.uint16)
        path([zeros, zeros], out, SCRATCH)
        assert out.tolist() == zeros.tolist()


@pytest.mark.parametrize("alpha", [0.3, 1.5, -0.5])
def test_the_sign_of_zero_does_not_depend_on_the_rest_of_the_piece(alpha: float) -> None:
    equal = np.array([0x8000, 0x3C00], np.uint16)
    different = np.array([0x8000, 0x3C01], np.uint16)
    combine = ExactSum(weights(alpha), ["F16", "F16"], "F16")
    outs = [np.empty(2, np.uint16), np.empty(2, np.uint16)]
    combine([equal, equal], outs[0], SCRATCH)
    combine([equal, different], outs[1], SCRATCH)
    assert outs[0][0] == outs[1][0]


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), surplus=st.sampled_from([-5, -1, 0, 1, 3]))
def test_a_zero_has_the_sign_of_the_exact_sum(dtype: str, seed: int, surplus: int) -> None:
    """Terms that cancel but for less than float64 can tell, or wholly: then +0, unless all of them are -0."""
    rng, target = np.random.default_rng(seed), FORMATS[dtype]
    share = Fraction(float(np.float32(rng.uniform(-1, 1)))) + Fraction(1, 2**70)
    coefficients = [Fraction(1), share, Fraction(surplus, 2**72) - share - 1]
    values = rng.choice([-0.03, 1.7, -0.0, 2.0**-14, -(2.0**-14)], 64)
    raw = encode(values, dtype)[0]
    out = np.empty(64, target.raw)
    ExactSum(coefficients, [dtype] * 3, dtype)([raw] * 3, out, SCRATCH)
    exact = values * surplus * 2.0**-72
    tiny = exact if dtype == "F16" else decode(encode(decode(raw, dtype) * surplus * 2.0**-72, dtype)[0], dtype)
    assert np.array_equal(decode(out, dtype), np.zeros(64) if dtype == "F16" else tiny)
    assert np.array_equal(np.signbit(decode(out, dtype)), exact < 0)
