"""All ways to a window of the order statistics, against sorting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdops.core.select import RadixSelect, window_mask
from sdops.errors import FormatError

# Few distinct values make ties common, neighbours share their upper bits, the others reach the whole pattern.
NEIGHBOURS = [1.0 + step * 2.0**-23 for step in range(200)]
SCORES = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 2.0]),
    st.floats(0, width=32, allow_infinity=True, allow_subnormal=True),
    st.sampled_from(NEIGHBOURS),
)


def sorted_mask(scores: Tensor, first: int, last: int) -> Tensor:
    """The definition, in plain Python."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, kept in zip(scores.tolist(), mask, strict=True):
        order = sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))
        kept[order[max(first, 0) : max(last, 0)]] = True
    return mask


def streamed_mask(scores: Tensor, first: int, last: int, chunk: int) -> Tensor:
    chunks = torch.split(scores, chunk, dim=1)
    select = RadixSelect(len(scores), first, last)
    for part in chunks[::-1]:
        select.count_high(part)
    for part in chunks[::-1]:
        select.count_low(part)
    return chunked_mask(select, scores, chunk)


def chunked_mask(select: RadixSelect, scores: Tensor, chunk: int) -> Tensor:
    ties, masks = select.no_ties(), []
    for part in torch.split(scores, chunk, dim=1):
        mask, ties = select.mask(part, ties)
        masks.append(mask)
    return torch.cat(masks, dim=1)


@settings(deadline=None)
@given(st.data())
def test_both_ways_keep_what_sorting_keeps(data: st.DataObject) -> None:
    rows, numel = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    values = data.draw(st.lists(SCORES, min_size=rows * numel, max_size=rows * numel))
    scores = torch.tensor(values, dtype=torch.float32).reshape(rows, numel)
    first, last = data.draw(st.integers(-1, numel + 1)), data.draw(st.integers(-1, numel + 3))
    expected = sorted_mask(scores, first, last)
    assert torch.equal(window_mask(scores, first, last), expected)
    chunk = data.draw(st.integers(1, 41))
    assert torch.equal(streamed_mask(scores, first, last, chunk), expected)
    assert torch.equal(chunked_mask(RadixSelect.of(scores, first, last), scores, chunk), expected)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (100, 60_000), (0, 100_000), (99_999, 100_000)])
def test_both_ways_agree_on_a_large_tensor(first: int, last: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Half-precision inputs give many equal scores.
    scores = torch.randn(2, 100_000, generator=generator).half().float().abs()
    mask = window_mask(scores, first, last)
    assert mask.sum(1).tolist() == [last - first] * 2
    assert torch.equal(streamed_mask(scores, first, last, 4099), mask)


@pytest.mark.parametrize("select", [RadixSelect.of(torch.ones(2, 3), -1, 4), RadixSelect.keeping_all(2)])
def test_a_window_around_everything_does_not_look_at_the_scores(select: RadixSelect) -> None:
    assert select.keeps_all
    mask, ties = select.mask(torch.full((2, 3), math.nan), select.no_ties())
    assert mask.all()
    assert not ties.any()
    assert not RadixSelect.of(torch.ones(2, 3), 0, 2).keeps_all


def test_places_beyond_32_bits_are_counted() -> None:
    block = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    select = RadixSelect(1, 0, 3 * 2**31 + 1)
    select.count_high(block)
    select.high *= 2**31  # as if the block had come 2^31 times
    select.count_low(block)
    select.low *= 2**31
    # 2^31 threes and 2^32 twos come first, then one one.
    ties = select.no_ties()
    mask, ties = select.mask(block, ties)
    assert mask.tolist() == [[True, True, True, True]]
    mask, ties = select.mask(block, ties)
    assert mask.tolist() == [[False, True, True, True]]
    assert ties[0, 1] == 2


@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_a_score_that_is_not_a_number_is_refused(way: str) -> None:
    scores = torch.tensor([[1.0, math.nan, math.inf]])
    with pytest.raises(FormatError, match="1 elements are not numbers"):
        window_mask(scores, 0, 1) if way == "whole" else RadixSelect(1, 0, 1).count_high(scores)


def test_zeros_of_either_sign_are_equal() -> None:
    assert window_mask(torch.tensor([[-0.0, 0.0, -0.0]]), 0, 2).tolist() == [[True, True, False]]
