"""Run merge methods that need only inner products: a pass for those, then an exact linear combination. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core import native
from sdops.core.exact import PIECE, ExactSum, Scratch
from sdops.core.inputs import read_raw
from sdops.core.linear import to_single
from sdops.core.method import Method
from sdops.core.plan import Step
from sdops.core.portions import Passes, Room, read_raws
from sdops.core.precision import FORMATS, Doubles, decode
from sdops.core.retained import SAMPLE, Retained

BLOCK, LANES = 512, 8  # of exact.c: elements whose products are added up at once, in so many sums


class Combined:
    """Evaluates steps with one method of class "gram". A tensor is read by one thread from start to end.

    Args:
        method: Makes coefficients of inner products.
        retained: Receives samples.
    """

    def __init__(self, method: Method, retained: Retained) -> None:
        self.method = method
        self.retained = retained
        self.passes = Passes()
        # two sets of buffers: a pass over a tensor may begin while a portion of it is at hand
        self._room, self._pass_room = Room(), Room()

    def splits(self) -> bool:
        """Whether threads may share a tensor: they would all have to pass over it."""
        return False

    def piece_bytes(self, step: Step) -> int:
        """Portions in which a step is computed."""
        return PIECE * FORMATS[step.spec.dtype].raw(0).itemsize

    def try_knobs(self, step: Step) -> None:
        """Call the method on the inner products of tensors without elements, so that it refuses bad knobs."""
        self.method.call(self.method.function, np.zeros([len(step.inputs)] * 2), knobs=step.knobs)

    def read_into(self, key: str, step: Step, start: int, buffer: memoryview) -> int:
        """Compute bytes of a merged tensor; return how many elements overflowed and were clamped.

        Raises:
            FormatError: an input holds NaN or infinity.
        """
        out = np.frombuffer(buffer, FORMATS[step.spec.dtype].raw)
        combine, used = self.passes.once(key, lambda: self._combination(step))
        first, overflow = start // out.itemsize, 0
        for begin in range(0, len(out), PIECE):
            part = out[begin : begin + PIECE]
            raws = [
                read_raw(step.inputs[i], first + begin, len(part), room)
                for i, room in zip(used, self._room.buffers(len(used)), strict=True)
            ]
            overflow += combine(raws, part, Scratch.of_thread())
            if first + begin == 0 and self.retained.wants(key):
                weights = dict(zip(used, combine.coefficients, strict=True))
                everything = [read_raw(item, 0, min(len(part), SAMPLE)) for item in step.inputs]
                self.retained.sample_linear(step, everything, weights, part)
        if start + len(buffer) >= step.spec.nbytes:
            self.passes.forget(key)
        return overflow

    def _combination(self, step: Step) -> tuple[ExactSum, list[int]]:
        """The sum that the inner products lead to, and which inputs have a coefficient other than zero."""
        exact = exact_coefficients(self.method, inner_products(step, self._pass_room), step.knobs)
        used = [i for i, c in enumerate(exact) if c]
        dtypes = [step.inputs[i].spec.dtype for i in used]
        return ExactSum([exact[i] for i in used], dtypes, step.spec.dtype), used


def exact_coefficients(method: Method, gram: NDArray[np.float64], knobs: Mapping[str, Any]) -> list[Fraction]:
    """What a method makes of inner products (N, N), each rounded to float32."""
    coefficients = method.call(method.function, gram, knobs=knobs).tolist()
    exact = [to_single(c) for c in coefficients]
    if abs(sum(coefficients) - 1) < 1e-12:  # an average stays one after rounding: equal models give themselves
        exact[0] = Fraction(1) - sum(exact[1:])
    return exact


def inner_products(step: Step, room: Room) -> NDArray[np.float64]:
    """Inner products of the inputs, (N, N)."""
    count = len(step.inputs)
    gram = np.zeros((count, count))
    dtypes = [item.spec.dtype for item in step.inputs]
    for first in range(0, step.spec.numel, PIECE):
        raws = read_raws(step, first, min(PIECE, step.spec.numel - first), room)
        if not native.inner(raws, dtypes, gram):
            add_inner([decode(raw, dtype) for raw, dtype in zip(raws, dtypes, strict=True)], gram)
    full: NDArray[np.float64] = np.tril(gram) + np.tril(gram, -1).T
    return full


def add_inner(values: Sequence[Doubles], gram: NDArray[np.float64]) -> None:
    """Add inner products on and below the diagonal, every sum in the order of compiled code (exact.c).

    The last bits of a library's matrix product depend on the processor, and where changes are small beside the models
    a method makes much of them.
    """
    blocks = [np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK // LANES, LANES) for x in values]
    for i, x in enumerate(blocks):
        for j, y in enumerate(blocks[: i + 1]):
            lanes = np.zeros((len(x), LANES))
            for products in (x * y).swapaxes(0, 1):
                lanes += products
            while lanes.shape[1] > 1:
                lanes = lanes[:, ::2] + lanes[:, 1::2]
            for dot in lanes[:, 0]:
                gram[i, j] += dot
