"""Chains of sums as compiled code plays them, bit by bit against numpy's exact sums, one after the other.

Compiled code works on blocks of 512 elements, fast where it can prove the result, else with more care: every tensor
here has both whole blocks and a rest, and values that lie where the fast way has its limits.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdops.core import native
from sdops.core.chain import Chain, Link
from sdops.core.exact import ExactSum, Scratch
from sdops.core.precision import FORMATS, Doubles, Raw, encode

pytestmark = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
SIZE = 2 * 512 + 37


def file(raw: Raw, dtype: str) -> Link:
    return Link(dtype, lambda first, count, _: raw[first : first + count])


def total(dtype: str, *terms: tuple[float | Fraction, Link]) -> Link:
    return Link(dtype, None, tuple((Fraction(c), operand) for c, operand in terms))


def constant(value: float, dtype: str) -> Link:
    return file(np.repeat(encode(np.array([value]), dtype)[0], SIZE), dtype)


def by_chain(last: Link) -> Raw | None:
    """None if compiled code leaves it to the steps."""
    chain, out = Chain(last), np.empty(SIZE, FORMATS[last.dtype].raw)
    rooms = [memoryview(bytearray(4 * SIZE)) for _ in chain.reads]
    return out if chain(0, out, rooms) else None


def by_steps(last: Link) -> tuple[Raw, int]:
    """The same by numpy, and how many elements overflowed on the way."""
    done: dict[Link, Raw] = {}
    overflows = 0

    def visit(one: Link) -> Raw:
        nonlocal overflows
        if one not in done and one.read is not None:
            done[one] = one.read(0, SIZE, memoryview(b""))
        elif one not in done:
            raws = [visit(operand) for _, operand in one.terms]
            combine = ExactSum([c for c, _ in one.terms], [operand.dtype for _, operand in one.terms], one.dtype)
            combine.native = None
            done[one] = np.empty(SIZE, FORMATS[one.dtype].raw)
            overflows += combine(raws, done[one], Scratch())
        return done[one]

    return visit(last), overflows


def tuned(rng: np.random.Generator, base: Doubles) -> Doubles:
    return base + rng.standard_normal(SIZE) * 0.002


def grid(rng: np.random.Generator, _: Doubles) -> Doubles:
    """Few units in the last place: sums are ties, zeros, or subnormal halves."""
    return rng.integers(-6, 7, SIZE) * 2.0 ** rng.choice([-25, -24, -14, -3])


def wide(rng: np.random.Generator, _: Doubles) -> Doubles:
    return rng.standard_normal(SIZE) * 2.0 ** rng.integers(-27, 3, SIZE)


def sparse(rng: np.random.Generator, base: Doubles) -> Doubles:
    """Zeros of both signs."""
    return np.where(rng.random(SIZE) < 0.6, np.copysign(0, rng.standard_normal(SIZE)), base)


def huge(rng: np.random.Generator, _: Doubles) -> Doubles:
    return rng.uniform(-65504, 65504, SIZE)


KINDS = [tuned, tuned, grid, wide, sparse, huge]
COEFFICIENTS = [1.0, 1.0, 0.5, -0.5, -1.0, 0.3, 0.7, -0.1, 1e-7, 2.0, 100.0]
STEP = st.tuples(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(COEFFICIENTS)), max_size=4), st.booleans())


@settings(max_examples=150, deadline=None)
@example(  # sums that are exactly zero, of terms that are not
    seed=0,
    kinds=[grid, tuned, tuned],
    dtypes=["F16"] * 5,
    steps=[([], False), ([(0, 1.0), (2, 1.0), (2, 1e-7)], True)],
)
@given(
    seed=st.integers(0, 1 << 32),
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    dtypes=st.one_of(st.just(["F16"] * 5), st.lists(st.sampled_from(native.DTYPES), min_size=5, max_size=5)),
    steps=st.lists(STEP, min_size=2, max_size=6),
)
def test_same_bits_as_numpy(seed, kinds, dtypes, steps):
    """Each step adds up to four others to the one before, which keeps such a share that all together are 1, or 1."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SIZE) * 0.03
    made = [file(encode(kind(rng, base), dtype)[0], dtype) for kind, dtype in zip(kinds, dtypes, strict=False)]
    for number, (others, is_average) in enumerate(steps):
        terms = [(Fraction(float(np.float32(c))), made[i]) for i, c in others if i < len(made) - 1]
        share = 1 - sum((c for c, _ in terms), Fraction(0)) if is_average else Fraction(1)
        made.append(total(dtypes[3 + number % 2], (share or Fraction(1), made[-1]), *terms))
    wanted, overflows = by_steps(made[-1])
    found = by_chain(made[-1])
    if overflows:
        assert found is None
    elif set(dtypes) == {"F16"}:
        assert found is not None
    assert found is None or np.array_equal(found, wanted)


# how far from a tie: less than double can tell, or lost in plain additions, one after the other
BESIDE = [[2.0**-70], [2.0**-56], [2.0**-35 + 2.0**-58, -(2.0**-35)], [-(2.0**-52)] + [0.4 * 2.0**-52] * 3]


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("deltas", BESIDE)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_lies_beside_a_tie(dtype, deltas, sign):
    """1, half a unit in the last place, and very little: in a last step, and in one before it."""
    half = 2.0 ** -(FORMATS[dtype].mantissa + 1)
    parts = [constant(1, dtype), *(constant(each, "F32") for each in (half, *(sign * delta for delta in deltas)))]
    inner = total(dtype, *((1, part) for part in parts))
    for last in (inner, total(dtype, (1, inner), (1, constant(half / 8, "F32")))):
        found = by_chain(last)
        assert found is not None
        assert set(found) == set(encode(np.array([1 + 2 * half if sign > 0 else 1.0]), dtype)[0])
        assert np.array_equal(found, by_steps(last)[0])


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_sums_are_multiples_of(dtype, sign):
    """The last bit of an earlier step's small sums puts a later one beside a tie, by less than double can tell."""
    bits = FORMATS[dtype].mantissa
    unit = sign * 2.0**-57
    longer, shorter = (total(dtype, (1, constant(unit * times, dtype))) for times in (2**bits + 1, 2**bits))
    half = constant(2.0 ** -(bits + 1), "F32")
    last = total(dtype, (1, constant(1, dtype)), (1, half), (1, longer), (-1, shorter))
    found = by_chain(last)
    assert found is not None
    assert set(found) == set(encode(np.array([1 + 2.0**-bits if sign > 0 else 1.0]), dtype)[0])


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("signs", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_zeros_keep_their_signs(dtype, signs):
    """A step that rounds to zero, or one that adds zeros, and another zero added to it."""
    tiny = FORMATS[dtype].lsb_exponent
    zeros = [constant(np.copysign(0.0, sign), dtype) for sign in signs]
    for first in (
        total(dtype, (2.0**-3, constant(signs[0] * 2.0**tiny, dtype))),
        total(dtype, (0.5, zeros[0])),
        total(dtype, (-0.5, constant(-signs[0] * 0.0, dtype))),
        total(dtype, (1, zeros[0]), (0.5, zeros[0])),
    ):
        last = total(dtype, (1, first), (1, zeros[1]))
        found = by_chain(last)
        assert found is not None
        assert set(found) == {FORMATS[dtype].sign if signs == (-1, -1) else 0}


@pytest.mark.parametrize("delta", [2.0**-149, -(2.0**-149)])
def test_the_sign_of_what_is_too_small_for_plain_addition(delta):
    """In plain double addition the sum is zero; the true one is not, and rounds to a zero of its sign."""
    parts = [constant(1, "F32"), constant(delta, "F32"), constant(1, "F32")]
    first = total("F16", *zip((1, 1, -1), parts, strict=True))
    last = total("F16", (1, first), (1, constant(-0.0, "F16")))
    found = by_chain(last)
    assert found is not None
    assert set(found) == {0 if delta > 0 else 0x8000}


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_units_of_subnormal_numbers(dtype):
    """Below the smallest normal number units do not get smaller."""
    unit = 2.0 ** FORMATS[dtype].lsb_exponent
    whole = np.arange(SIZE) % 67
    first = total(dtype, (0.5, file(encode(whole * unit, dtype)[0], dtype)))
    last = total(dtype, (1, first), (1, constant(16 * unit, dtype)))
    found = by_chain(last)
    assert found is not None
    wanted = np.rint(whole / 2) + 16  # ties to even
    assert np.array_equal(found, encode(wanted * unit, dtype)[0])


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_largest_numbers(dtype):
    """A sum that just does not overflow is made; one that does is left to the steps."""
    largest = FORMATS[dtype].largest
    unit = largest - float(largest * (1 - 2.0 ** -(FORMATS[dtype].mantissa + 1)))
    one, small = constant(largest, dtype), constant(unit * 0.249, "F32")
    fits, does_not = (total(dtype, (1, total(dtype, (1, one), (c, small))), (-0.5, one)) for c in (1, 5))
    found = by_chain(fits)
    assert found is not None
    assert np.array_equal(found, by_steps(fits)[0])
    assert by_chain(does_not) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_left_to_the_steps(value):
    for dtype in native.DTYPES:
        bad = np.zeros(SIZE)
        bad[100] = value
        with np.errstate(all="ignore"):
            raw = encode(bad, dtype)[0]
        raw[100] = FORMATS[dtype].infinity + (np.isnan(value))
        assert by_chain(total(dtype, (0.5, file(raw, dtype)), (0.5, constant(1, dtype)))) is None
