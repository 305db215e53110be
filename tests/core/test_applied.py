from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core.applied import Applied, Change, Dense, LowRank
from sdops.core.casting import raw_dtype
from sdops.core.fp8 import fp8_values
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.core.views import Dequantised
from sdops.errors import FormatError
from tests.tiny import Memory, encoded, numbers

KEY = "layer.weight"
DTYPES = ("F16", "BF16", "F32", "F64")


def factors(rng, rows, columns, rank=3, scale=0.1):
    up = (rng.standard_normal((rows, rank)) * scale).astype(np.float32)
    return up, (rng.standard_normal((rank, columns)) * scale).astype(np.float32)


def low_rank(up, down, start=0):
    return LowRank(start, len(up), lambda: (lambda first, last: up[first:last], down))


def model(shape, dtype="F16", seed=0, scale=0.05):
    return Memory({KEY: encoded(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)})


def values(source, key=KEY):
    spec = source.specs[key]
    return numbers((spec.dtype, np.frombuffer(bytes(read(source, key)), raw_dtype(spec.dtype)).reshape(spec.shape)))


def in_pieces(source, key, step):
    data = bytearray(source.specs[key].nbytes)
    for start in range(0, len(data), step):
        source.read_into(key, start, memoryview(data)[start : start + step])
    return data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 23), (5, 4, 3, 3), (600, 701)])
def test_the_sum_is_rounded_once(dtype, shape):
    rng, source = np.random.default_rng(1), model(shape, dtype)
    up, down = factors(rng, shape[0], int(np.prod(shape[1:])))
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))})
    delta = (up.astype(np.float64) @ down).astype(np.float32)
    wanted = values(source) + delta.astype(np.float64).reshape(shape)
    assert np.array_equal(values(made), numbers(encoded(wanted, dtype)))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    step=st.integers(1, 300),
    dtype=st.sampled_from(["F16", "BF16", "F32"]),
    seed=st.sampled_from([None, 0, 5]),
)
def test_pieces_are_the_whole(rows, columns, step, dtype, seed):
    """Values do not depend on how they are asked for, nor does the noise of random rounding."""
    source = model((rows, columns), dtype)
    up = np.arange(rows, dtype=np.float32)[:, None] / 64  # products are exact
    down = np.arange(columns, dtype=np.float32)[None] / 64
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))}, seed=seed)
    size = raw_dtype(dtype).itemsize
    assert in_pieces(made, KEY, step * size) == read(made, KEY)


def test_a_tensor_longer_than_a_portion():
    source = model((700, 1000))
    up, down = factors(np.random.default_rng(2), 700, 1000)
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))})
    step = made.piece_bytes(KEY)
    assert step < source.specs[KEY].nbytes
    assert step % 2000 == 0  # whole rows
    assert made.splits(KEY)
    assert made.forks
    assert in_pieces(made, KEY, step) == read(made, KEY)


def test_a_row_longer_than_a_portion():
    columns = (1 << 18) + 5
    source = model((2, columns))
    up, down = factors(np.random.default_rng(2), 2, columns, rank=1)
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))})
    wanted = values(source) + (up @ down).astype(np.float64)
    assert np.allclose(values(made), wanted, rtol=2**-10, atol=1e-7)


def test_rows_of_a_fused_matrix_change_alone():
    rng, source = np.random.default_rng(3), model((12, 8), "F32")
    query, value = factors(rng, 4, 8), factors(rng, 4, 8)
    terms = (low_rank(*query, start=0), low_rank(*value, start=8))
    change = values(Applied(source, {KEY: Change(source.specs[KEY], terms)})) - values(source)
    assert np.allclose(change[:4], query[0] @ query[1], atol=1e-7)
    assert np.all(change[4:8] == 0)
    assert np.allclose(change[8:], value[0] @ value[1], atol=1e-7)


def test_several_loras_are_summed_before_they_are_rounded():
    """Eight changes of less than half a unit each move the weight together."""
    source = Memory({KEY: encoded(np.ones((4, 4)), "BF16")})
    quarter = np.full((4, 1), 2**-9, np.float32)  # half a unit of bfloat16 at 1 is 2**-8
    terms = tuple(low_rank(quarter, np.ones((1, 4), np.float32)) for _ in range(8))
    assert np.all(values(Applied(source, {KEY: Change(source.specs[KEY], terms)})) == 1 + 2**-6)
    assert np.all(values(Applied(source, {KEY: Change(source.specs[KEY], terms[:1])})) == 1)


def test_adding_and_taking_away_is_nothing():
    source = model((30, 20), "F32")
    up, down = factors(np.random.default_rng(4), 30, 20)
    there = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))})
    back = Applied(there, {KEY: Change(source.specs[KEY], (low_rank(-up, down),))})
    assert np.allclose(values(back), values(source), rtol=0, atol=1e-7)


def test_dense_changes_see_the_original_weight_unless_sequential():
    source = model((6, 5), "F32")
    twice = Dense(lambda weights: weights(KEY).copy())  # W' = 2 W
    change = Change(source.specs[KEY], (twice, twice))
    assert np.allclose(values(Applied(source, {KEY: change})), 3 * values(source))
    assert np.allclose(values(Applied(source, {KEY: change}, sequential=True)), 4 * values(source))


def test_dense_changes_are_made_once_for_a_reader_in_pieces():
    calls = []

    def delta(weights):
        calls.append(1)
        return np.ones_like(weights(KEY))

    source = model((6, 5))
    made = Applied(source, {KEY: Change(source.specs[KEY], (Dense(delta),))})
    assert made.piece_bytes(KEY) == source.specs[KEY].nbytes
    assert not made.splits(KEY)
    assert not made.forks
    assert np.allclose(
        np.frombuffer(bytes(in_pieces(made, KEY, 6)), np.float16).reshape(6, 5), values(source) + 1, rtol=2**-10
    )
    assert len(calls) == 1


def test_dense_changes_may_see_other_weights():
    source = Memory({KEY: encoded(np.ones((2, 2)), "F16"), "other": encoded(np.full((2, 2), 5.0), "BF16")})
    made = Applied(source, {KEY: Change(source.specs[KEY], (Dense(lambda weights: weights("other") + weights(KEY)),))})
    assert np.all(values(made) == 7)


def test_a_weight_grows():
    source = model((3, 2), "F16")
    up, down = factors(np.random.default_rng(5), 3, 4)
    made = Applied(source, {KEY: Change(Spec("F16", (3, 4)), (low_rank(up, down),))})
    wanted = np.pad(values(source), ((0, 0), (0, 2))) + up @ down
    assert np.allclose(values(made), wanted, rtol=2**-10, atol=2**-24)


def test_untouched_tensors_are_copied_and_other_weights_read():
    copied = Memory({KEY: encoded(np.zeros((2, 2)), "F16"), "rest": encoded(np.full(3, 2.0), "F16")})
    wide = Memory({KEY: encoded(np.full((2, 2), 1 + 2**-12), "F32"), "rest": encoded(np.zeros(3), "F32")})
    up, down = np.full((2, 1), 2**-12, np.float32), np.ones((1, 2), np.float32)
    made = Applied(copied, {KEY: Change(copied.specs[KEY], (low_rank(up, down),))}, weights=wide)
    assert np.all(values(made, "rest") == 2)
    # 1 + 2**-12 + 2**-12 = 1 + 2**-11 is a tie, which goes to the even 1; anything less precise before would do so, too
    assert np.all(values(made) == 1)
    assert made.specs[KEY] == Spec("F16", (2, 2))


def test_what_survives_is_told():
    rng = np.random.default_rng(6)
    weight = np.random.default_rng(7).standard_normal((256, 256)) * 0.03
    up, down = factors(rng, 256, 256, rank=8, scale=1.0)
    for ratio, least, most in ((3e-2, 0.99, 1.01), (1e-3, 0.4, 0.65), (3e-4, 0.1, 0.3)):
        source = Memory({KEY: encoded(weight, "BF16")})
        small = up * np.float32(ratio * 0.03 / np.std(up @ down))
        nearest = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(small, down),))})
        read(nearest, KEY)
        assert least < nearest.adder.kept()[KEY] < most
        wanted = (small @ down).astype(np.float64)
        change = values(nearest) - values(source)
        assert nearest.adder.kept_overall() == pytest.approx((change * wanted).sum() / (wanted**2).sum(), abs=0.05)


def test_random_rounding_keeps_everything_on_average():
    source = Memory({KEY: encoded(np.ones((512, 512)), "BF16")})
    up, down = np.full((512, 1), 2**-10, np.float32), np.ones((1, 512), np.float32)
    change = {KEY: Change(source.specs[KEY], (low_rank(up, down),))}
    assert np.all(values(Applied(source, change)) == 1)
    found = values(Applied(source, change, seed=1))
    assert set(np.unique(found)) == {1, 1 + 2**-7}
    assert np.mean(found - 1) == pytest.approx(2**-10, rel=0.03)
    assert np.array_equal(found, values(Applied(source, change, seed=1)))
    assert not np.array_equal(found, values(Applied(source, change, seed=2)))


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
def test_fp8_weights_get_a_new_scale(rows, scale_dtype):
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 0x70, (6, 5)).astype(np.uint8)
    scale = "layer.scale_weight"
    old = np.full(() if rows is None else (rows, 1), 2**-6)
    origin = Memory({KEY: ("F8_E4M3", codes), scale: encoded(old, scale_dtype)})
    before = fp8_values("F8_E4M3")[codes].astype(np.float64) * 2**-6
    up, down = factors(rng, 6, 5, scale=2.0)
    change = {KEY: Change(origin.specs[KEY], (low_rank(up, down),), scale)}
    made = Applied(origin, change, weights=Dequantised(origin))
    wanted = before + up @ down
    found = values(Dequantised(made))
    most = abs(wanted).max() if rows is None else abs(wanted).max(axis=1, keepdims=True)
    assert made.specs == origin.specs
    assert np.all(abs(found - wanted) <= abs(wanted) * 2**-4 + most / 448 * 2**-9)
    assert abs(found).max() == pytest.approx(abs(wanted).max(), rel=2**-3 if scale_dtype == "BF16" else 1e-6)
    assert made.adder.kept()[KEY] == pytest.approx(1, abs=0.1)


def test_counts_of_processes_are_added_up():
    source = model((40, 30))
    up, down = factors(np.random.default_rng(9), 40, 30)
    change = {KEY: Change(source.specs[KEY], (low_rank(up, down),))}
    whole, one, two = (Applied(source, change) for _ in range(3))
    read(whole, KEY)
    read(one, KEY)
    two.add(one.tally())
    two.add(one.tally())
    assert two.adder.kept() == pytest.approx(whole.adder.kept())


def test_what_is_too_large_is_clamped_and_counted():
    source = Memory({KEY: encoded(np.full((2, 3), 60000.0), "F16")})
    up, down = np.full((2, 1), 1e4, np.float32), np.ones((1, 3), np.float32)
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))})
    assert np.all(values(made) == 65504)
    assert made.adder.overflows == {KEY: 6}


@pytest.mark.parametrize("seed", [None, 3])
def test_nan_in_the_model_is_named(seed):
    weight = np.ones((2, 3))
    weight[1, 1] = np.nan
    source = Memory({KEY: ("F32", weight.astype(np.float32))})
    up, down = factors(np.random.default_rng(0), 2, 3)
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))}, seed=seed)
    with pytest.raises(FormatError, match=r"`layer.weight` of `memory` holds 1 NaN"):
        read(made, KEY)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_change_beyond_all_numbers_is_refused(seed):
    source = model((2, 3))
    up, down = np.full((2, 1), 3e38, np.float32), np.full((1, 3), 10, np.float32)
    made = Applied(source, {KEY: Change(source.specs[KEY], (low_rank(up, down),))}, seed=seed)
    with pytest.raises(FormatError, match="too large for float32"):
        read(made, KEY)
