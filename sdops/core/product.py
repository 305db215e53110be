"""Elements of a sum of products up @ down, with the same bits wherever they are made, and however many at once.

    delta[i, j] = round(sum over terms, sum over k of up[i, k] * down[k, j])

Products of float32 are exact in float64. They are added up there in the order of the terms and of k, and the sum is
rounded to float32 once. The last bits of a library's matrix product depend on the processor and on the block's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdops.core import native
from sdops.core.precision import Singles


class Term(NamedTuple):
    """A product, and where it is added.

    Attributes:
        first: Row of the matrix to which the first row of `up` belongs.
        up: [rows, r], contiguous.
        down: [r, columns], contiguous.
    """

    first: int
    up: Singles
    down: Singles


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that is such a sum.

    Attributes:
        columns: Of the matrix.
        terms: First row, one past the last -> what these rows are made of.
    """

    columns: int
    terms: Callable[[int, int], Sequence[Term]]

    def terms_for(self, first: int, count: int) -> Sequence[Term]:
        """What so many elements from `first` on are made of."""
        return self.terms(first // self.columns, -(-(first + count) // self.columns))


def multiply(product: Product, first: int, out: Singles) -> None:
    """Make elements of the sum.

    Args:
        product: The sum.
        first: Place of the first element, counted through the rows of the matrix.
        out: Where they go, contiguous.
    """
    columns, terms = product.columns, product.terms_for(first, len(out))
    if native.product(terms, columns, first, out):
        return
    top, bottom = first // columns, -(-(first + len(out)) // columns)
    total = np.zeros((bottom - top, columns))
    for start, up, down in terms:
        begin, end = max(start, top), min(start + len(up), bottom)
        if begin < end:
            for factors, row in zip(up[begin - start : end - start].T, down, strict=True):
                total[begin - top : end - top] += np.multiply.outer(factors, row, dtype=np.float64)
    out[:] = total.reshape(-1)[first - top * columns :][: len(out)]
