"""The masks of a ranked merge method, one portion after the other."""

from __future__ import annotations

from torch import Tensor

from sdops.core.select import RadixSelect


class Ranking:
    """Hands out the masks of a finished selection, portion by portion in flat order.

    Attributes:
        rows: Number of score rows S.
        keeps_all: Whether all elements are kept, so that no scores are needed.
    """

    def __init__(self, select: RadixSelect) -> None:
        self._select = select
        self.rows = select.rows
        self.keeps_all = select.keeps_all
        self.rewind()

    def rewind(self) -> None:
        """Start again from the first element."""
        self.position = 0
        self._ties = self._select.no_ties()

    def advance(self, scores: Tensor) -> Tensor:
        """The mask (S, n) of the next n elements."""
        mask, self._ties = self._select.mask(scores, self._ties)
        self.position += scores.shape[1]
        return mask
