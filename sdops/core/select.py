"""Which elements fall into a window of the order statistics, exactly, ties included.

Order of the elements of one row of scores: largest first, equal scores by increasing flat index. The elements
at places [first, last) of that order are kept. Two ways to the same mask:

    window_mask, RadixSelect.of   the whole tensor at hand: partition, O(n)
    RadixSelect                   a tensor that is read in chunks, three times: two histograms, then masks

Scores are non-negative float32, so that their bit patterns, read as integers, are ordered as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdops.errors import FormatError

Bits = NDArray[np.int32]
Counts = NDArray[np.int64]

BINS = 1 << 16
LAST_BIN = BINS - 1
INFINITY_BITS = 0x7F800000


class End(NamedTuple):
    """One end of a window: the elements before it exceed `border`, or are among the first `room` equal to it."""

    border: int
    room: int


BEFORE_ALL = End(0x7FFFFFFF, 0)
BEHIND_ALL = End(-1, 0)


def window_mask(scores: Tensor, first: int, last: int) -> Tensor:
    """The elements at places [first, last) of each row, largest score first: bool (S, n) from scores (S, n).

    Raises:
        FormatError: a score is not a number.
    """
    select = RadixSelect.of(scores, first, last)
    return select.mask(scores, select.no_ties())[0]


class RadixSelect:
    """`window_mask` of a tensor that is read chunk by chunk. Memory: 1.5 MB per row, whatever the tensor's size.

        select = RadixSelect(rows=2, first=0, last=1000)
        for chunk in chunks: select.count_high(scores(chunk))      # any order
        for chunk in chunks: select.count_low(scores(chunk))       # any order
        ties = select.no_ties()
        for chunk in chunks: mask, ties = select.mask(scores(chunk), ties)      # in flat order

    The first pass counts the upper 16 bits of the scores, which tells the bucket that holds each end of the
    window; the second counts the lower 16 bits inside that bucket, which tells the score at the end and how
    many elements equal to it lie inside. The third hands those out in flat order.

    Args:
        rows: Number of score rows S.
        first: First place kept, 0 = largest score.
        last: Place behind the last one kept; clipped to the number of elements.
    """

    def __init__(self, rows: int, first: int, last: int) -> None:
        self.rows = rows
        self.window = first, last
        self.high = np.zeros((rows, BINS), dtype=np.int64)
        self.low = np.zeros((rows, 2, BINS), dtype=np.int64)

    @classmethod
    def of(cls, scores: Tensor, first: int, last: int) -> RadixSelect:
        """Ready for the masks, from all scores (S, n) at once: no passes over chunks needed.

        Raises:
            FormatError: a score is not a number.
        """
        select = cls(len(scores), first, last)
        select._ends = [[_partition(row, place) for place in select.window] for row in _checked(_bits(scores))]
        return select

    @classmethod
    def keeping_all(cls, rows: int) -> RadixSelect:
        """Ready for the masks of a window that no element is outside of: scores are not looked at."""
        select = cls(rows, 0, 0)
        select._ends = [[BEFORE_ALL, BEHIND_ALL]] * rows
        return select

    @property
    def keeps_all(self) -> bool:
        """Whether every element of every row is kept, so that nobody need look at the scores."""
        return all(ends == [BEFORE_ALL, BEHIND_ALL] for ends in self._ends)

    def count_high(self, scores: Tensor) -> None:
        """First pass: a chunk of the scores (S, n).

        Raises:
            FormatError: a score is not a number.
        """
        for row, counts in zip(_checked(_bits(scores)), self.high, strict=True):
            found = np.bincount(row >> 16)  # up to the largest score only
            counts[: len(found)] += found

    def count_low(self, scores: Tensor) -> None:
        """Second pass: a chunk of the scores (S, n)."""
        for row, counts, ends in zip(_bits(scores), self.low, self._buckets, strict=True):
            for count, (bucket, place) in zip(counts, ends, strict=True):
                if place:
                    inside = row[np.flatnonzero(row >> 16 == bucket)]
                    np.add.at(count, inside & LAST_BIN, 1)  # inside are few: a histogram of their own would cost more

    def no_ties(self) -> Tensor:
        """What `mask` takes for the first chunk: int64 zeros (S, 2)."""
        return torch.zeros(self.rows, 2, dtype=torch.int64)

    def mask(self, scores: Tensor, ties_before: Tensor) -> tuple[Tensor, Tensor]:
        """Third pass: which of a chunk's elements are kept.

        Args:
            scores: The chunk, (S, n).
            ties_before: For each row and end of the window, how many elements equal to the score at that end lie
                in earlier chunks; (S, 2).

        Returns:
            bool (S, n), and `ties_before` for the chunk that follows.
        """
        if self.keeps_all:
            return torch.ones(scores.shape, dtype=torch.bool, device=scores.device), ties_before
        mask = np.empty(scores.shape, dtype=np.bool_)
        ties = ties_before.tolist()
        for row, kept, ends, seen in zip(_bits(scores), mask, self._ends, ties, strict=True):
            before = []
            for index, end in enumerate(ends):
                elements, equal = _before(row, end, seen[index])
                before.append(elements)
                seen[index] += equal
            np.greater(before[1], before[0], out=kept)  # before the last place, but not before the first
        return torch.from_numpy(mask).to(scores.device), torch.tensor(ties, dtype=torch.int64)

    @cached_property
    def _buckets(self) -> list[list[tuple[int, int]]]:
        """For each row and end: upper 16 bits of the score there, and the end's place among the elements with those."""
        return [[_bucket(counts, place) for place in self.window] for counts in self.high]

    @cached_property
    def _ends(self) -> list[list[End]]:
        """Both ends of the window in each row."""
        return [
            [_border(bucket, place, counts) for (bucket, place), counts in zip(buckets, low, strict=True)]
            for buckets, low in zip(self._buckets, self.low, strict=True)
        ]


def _bucket(counts: Counts, place: int) -> tuple[int, int]:
    """The bin of a histogram (BINS,) that holds a place; a place outside of all elements is place 0 of no bin."""
    if place <= 0:
        return BEFORE_ALL.border >> 16, 0
    if place >= counts.sum():
        return BEHIND_ALL.border >> 16, 0
    return _locate(counts, place)


def _border(bucket: int, place: int, counts: Counts) -> End:
    """The end at a place in a bucket from the histogram (BINS,) of the lower 16 bits in it."""
    if place == 0:  # nothing in the bucket comes before it
        return End(bucket << 16 | LAST_BIN, 0)
    low, room = _locate(counts, place)
    return End(bucket << 16 | low, room)


def _locate(counts: Counts, place: int) -> tuple[int, int]:
    """The bin that holds a place, 0 <= place < sum of the counts, from the highest bin on; its place in the bin."""
    reached = np.cumsum(counts[::-1])  # elements in this bin and all higher ones
    index = int(np.searchsorted(reached, place, side="right"))
    holder = LAST_BIN - index
    return holder, place - int(reached[index] - counts[holder])


def _partition(row: Bits, place: int) -> End:
    """The end at a place of a whole row (n,)."""
    numel = len(row)
    if place <= 0 or place >= numel:
        return BEFORE_ALL if place <= 0 else BEHIND_ALL
    ascending = numel - 1 - place
    parts = np.partition(row, ascending)
    border = int(parts[ascending])
    return End(border, place - int(np.count_nonzero(parts[ascending + 1 :] > border)))


def _before(row: Bits, end: End, seen: int) -> tuple[NDArray[np.bool_], int]:
    """Which elements of a chunk (n,) come before an end of which `seen` ties lie in earlier chunks; its own ties."""
    before = row > end.border
    if not end.room:
        return before, 0
    equal = np.flatnonzero(row == end.border)
    before[equal[: max(end.room - seen, 0)]] = True
    return before, len(equal)


def _bits(scores: Tensor) -> Iterator[Bits]:
    """Bit patterns (n,) of each row of scores (S, n), ordered as the scores are; the sign of a zero is dropped."""
    for row in scores.to("cpu", torch.float32).numpy().view(np.int32):
        yield row & np.int32(0x7FFFFFFF)


def _checked(rows: Iterator[Bits]) -> Iterator[Bits]:
    """The same bits, if they are those of numbers.

    Raises:
        FormatError: a score is not a number.
    """
    for bits in rows:
        if bits.size and bits.max() > INFINITY_BITS:
            count = int(np.count_nonzero(bits > INFINITY_BITS))
            raise FormatError(
                f"{count} elements are not numbers, so they cannot be ranked",
                hint="`sdops verify FILE` names the tensors that hold NaN",
                count=count,
            )
        yield bits
