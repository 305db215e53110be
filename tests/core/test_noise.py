"""Laws of the counter-based random source."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.core.noise import Noise, philox

# Random123, file kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    column = np.array(words(counter), dtype=np.uint32)[:, None]
    k0, k1 = words(key)
    result = philox(np.repeat(column, 3, axis=1), (k0, k1))
    assert np.stack(result, axis=1).tolist() == [words(expected)] * 3


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@settings(deadline=None)
@given(total=st.integers(1, 300), cuts=st.lists(st.integers(0, 300), max_size=5), start=st.integers(0, 2**36))
def test_chunks_do_not_matter(kind: str, total: int, cuts: list[int], start: int) -> None:
    noise = Noise(7, "model.weight")
    whole = getattr(noise.at(start), kind)(1, torch.empty(total))
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    parts = [
        getattr(noise.at(start + low), kind)(1, torch.empty(high - low)) for low, high in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_chunks_larger_than_a_block_join_without_a_seam() -> None:
    noise = Noise(0, "k")
    whole = noise.uniform(0, torch.empty(200_003))
    assert torch.equal(noise.at(131_001).uniform(0, torch.empty(69_002)), whole[131_001:])


def test_counters_use_more_than_32_bits() -> None:
    noise = Noise(0, "k")
    like = torch.empty(64)
    assert not torch.equal(noise.at(4 * 2**32).uniform(0, like), noise.uniform(0, like))


def test_every_part_of_the_name_matters() -> None:
    like = torch.empty(64)
    draws = [
        Noise(0, "a").uniform(0, like),
        Noise(1, "a").uniform(0, like),
        Noise(0, "b").uniform(0, like),
        Noise(0, "a").uniform(1, like),
        Noise(0, "a").uniform(0, like, stream=1),
        Noise(0, "a", 4).uniform(0, like),
        Noise(-1, "a").uniform(0, like),
        Noise(2**80, "ä\udc80").uniform(0, like),
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_stays_the_same_for_ever() -> None:
    values = Noise(0, "first_stage_model.decoder.conv_in.weight").uniform(0, torch.empty(4))
    assert (values * 2**24).tolist() == [1858435, 1909635, 15129881, 8612599]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_has_the_shape_of_the_chunk(kind: str, shape: tuple[int, ...]) -> None:
    result = getattr(Noise(0, "k"), kind)(0, torch.empty(shape, dtype=torch.float64))
    assert result.shape == shape
    assert result.dtype == torch.float32


def test_uniform_fills_the_unit_interval_evenly() -> None:
    count, bins = 400_000, 64
    values = Noise(3, "k").uniform(0, torch.empty(count))
    assert values.min() >= 0
    assert values.max() < 1
    observed = torch.histc(values, bins, 0, 1)
    expected = count / bins
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


def test_normal_has_the_moments_of_a_normal() -> None:
    count = 400_000
    values = Noise(3, "k").normal(0, torch.empty(count)).double()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((values**power).mean() - moment) < 5 * math.sqrt(variance / count), power
    neighbours = (values[:-1] * values[1:]).mean()
    assert abs(neighbours) < 5 / math.sqrt(count)


def test_normal_follows_the_documented_formula() -> None:
    noise = Noise(5, "k")
    stored = (noise._words(2, 0, 8)[0]).reshape(-1, 2)
    expected = []
    for first, second in stored.tolist():
        radius = math.sqrt(-2 * math.log((first + 1) / 2**32))
        angle = 2 * math.pi * second / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    values = noise.normal(2, torch.empty(8))
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=2e-7, atol=1e-7)
