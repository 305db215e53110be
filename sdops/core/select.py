"""Which elements fall into a window of the order statistics, exactly, ties included.

Order of the elements of one row of scores: largest first, equal scores by increasing flat index. The elements
at places [first, last) of that order are kept. Two ways to the same mask:

    window_mask     the whole tensor at hand: partition, O(n)
    RadixSelect     a tensor that is read in chunks, three times: two histograms, then masks

Scores are non-negative float32, so that their bit patterns, read as integers, are ordered as they are.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdops.errors import FormatError

BINS = 1 << 16
INFINITY_BITS = 0x7F800000


def window_mask(scores: Tensor, first: int, last: int) -> Tensor:
    """The elements at places [first, last) of each row, largest score first: bool (S, n) from scores (S, n).

    Raises:
        FormatError: a score is not a number.
    """
    mask = torch.empty(scores.shape, dtype=torch.bool)
    for row, kept in zip(_bits(scores).cpu(), mask, strict=True):
        kept.copy_(_before(row, last) & ~_before(row, first))
    return mask.to(scores.device)


def _before(row: Tensor, place: int) -> Tensor:
    """Which elements of a row (n,) come before `place`."""
    numel = len(row)
    if place <= 0 or place >= numel:
        return torch.full((numel,), place > 0)
    ascending = numel - 1 - place
    border = int(np.partition(row.numpy(), ascending)[ascending])
    return _ahead(row, border, place - int(torch.count_nonzero(row > border)))[0]


def _ahead(row: Tensor, border: int, room: int) -> tuple[Tensor, int]:
    """Which elements of a row (n,) exceed the border or are among the first `room` equal to it; how many are equal."""
    ahead = row > border
    equal = (row == border).nonzero().squeeze(1)
    ahead[equal[: max(room, 0)]] = True
    return ahead, len(equal)


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

    def count_high(self, scores: Tensor) -> None:
        """First pass: a chunk of the scores (S, n).

        Raises:
            FormatError: a score is not a number.
        """
        for row, counts in zip(_bits(scores) >> 16, self.high, strict=True):
            counts += torch.bincount(row, minlength=BINS).cpu().numpy()

    def count_low(self, scores: Tensor) -> None:
        """Second pass: a chunk of the scores (S, n)."""
        for row, counts, buckets in zip(_bits(scores), self.low, self._buckets[0].tolist(), strict=True):
            for count, bucket in zip(counts, buckets, strict=True):
                inside = row[(row >> 16) == bucket] & (BINS - 1)
                count += torch.bincount(inside, minlength=BINS).cpu().numpy()

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
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        ties_after = ties_before.clone()
        for index, row in enumerate(_bits(scores)):
            ahead = []
            for end, (border, room) in enumerate(self._ends[index]):
                inside, equal = _ahead(row, border, room - int(ties_before[index, end]))
                ahead.append(inside)
                ties_after[index, end] += equal
            mask[index] = ahead[1] & ~ahead[0]
        return mask, ties_after

    @cached_property
    def _buckets(self) -> tuple[np.ndarray, np.ndarray]:
        """Upper 16 bits of the score at each end of the window, and the end's place within that bucket; (S, 2)."""
        places = np.clip(np.array([self.window] * self.rows), 0, self.high.sum(axis=1, keepdims=True))
        return _locate(self.high, places)

    @cached_property
    def _ends(self) -> list[list[tuple[int, int]]]:
        """For each row and end of the window: the score's bit pattern, how many equal to it come before the end."""
        buckets, places = self._buckets
        ends = []
        for end in range(2):
            low, room = _locate(self.low[:, end], places[:, end : end + 1])
            ends.append(zip((buckets[:, end] << 16 | low[:, 0]).tolist(), room[:, 0].tolist(), strict=True))
        return [list(pair) for pair in zip(*ends, strict=True)]


def _locate(counts: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin that holds each place, counted from the highest bin, and the place's position within the bin.

    Args:
        counts: How many elements each bin holds, (S, BINS).
        places: Places (S, P) from 0 to the number of elements inclusive; the latter is behind all of bin 0.
    """
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # elements in this bin and all higher ones
    # The place lies in the highest bin whose total exceeds it.
    bins = np.array(
        [BINS - 1 - np.searchsorted(total[::-1], row, side="right") for total, row in zip(above, places, strict=True)]
    ).clip(min=0)
    higher = np.take_along_axis(above, bins, axis=1) - np.take_along_axis(counts, bins, axis=1)
    return bins, places - higher


def _bits(scores: Tensor) -> Tensor:
    """Bit patterns of the scores as int32, ordered as the scores are; the sign of a zero is dropped."""
    bits = scores.to(torch.float32).abs().view(torch.int32)
    if bits.numel() and int(bits.max()) > INFINITY_BITS:
        count = int((bits > INFINITY_BITS).sum())
        raise FormatError(
            f"{count} elements are not numbers, so they cannot be ranked",
            hint="`sdops verify FILE` names the tensors that hold NaN",
            count=count,
        )
    return bits
