"""round(W + delta), rounded once; how much of delta survives that; and which scale the sum needs as fp8.

For the change d = W' - W that was written and the wanted change delta, <d, delta> / <delta, delta> is 1 when nothing
is lost and 0 when nothing arrived: weights whose change is less than half a unit in the last place do not move.
Rounding at random keeps it at 1 on average.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from sdops.core.casting import cast
from sdops.core.exact import PIECE, ExactSum, NonFiniteError, Scratch
from sdops.core.fp8 import WRITABLE, fp8_values
from sdops.core.inputs import nonfinite
from sdops.core.noise import Noise
from sdops.core.plan import Input
from sdops.core.precision import FORMATS, Doubles, Raw, Singles, count_nonfinite, decode
from sdops.core.spec import FP8
from sdops.errors import FormatError

SAMPLE = 4096  # elements of a portion from which is told what survived
Tally = tuple[Mapping[str, int], Mapping[str, tuple[float, float]]]


class Adder:
    """Adds changes to weights and counts what becomes of them; safe to use from several threads.

    Args:
        seed: Round at random, keyed by seed, tensor and element, instead of to nearest.

    Attributes:
        overflows: Tensor -> number of elements that were too large for the output dtype and were clamped.
    """

    def __init__(self, seed: int | None) -> None:
        self.overflows: dict[str, int] = {}
        self._seed = seed
        self._kept: dict[str, tuple[float, float]] = {}
        self._sums: dict[tuple[str, str], ExactSum] = {}
        self._lock = threading.Lock()

    @property
    def is_exact(self) -> bool:
        """Whether sums are rounded to the nearest."""
        return self._seed is None

    def kept(self) -> dict[str, float]:
        """Tensor -> share of the change that survived the rounding, sampled."""
        return {key: got / wanted for key, (got, wanted) in self._kept.items() if wanted}

    def kept_overall(self) -> float | None:
        """The same of all tensors together; None if nothing was to change."""
        got, wanted = (sum(each[i] for each in self._kept.values()) for i in (0, 1))
        return got / wanted if wanted else None

    def tally(self) -> Tally:
        """What was counted in this process."""
        return self.overflows, self._kept

    def add(self, tally: Tally) -> None:
        """Add what another process counted."""
        overflows, kept = tally
        for key, (got, wanted) in kept.items():
            self._count(key, overflows.get(key, 0), got, wanted)

    def write(
        self, item: Input, weight: Raw, delta: Singles, out: Raw, target: str, first: int, scale: Doubles | None = None
    ) -> None:
        """Write W + delta, rounded once.

        Args:
            item: The tensor that W is of.
            weight: Bit patterns of some of its elements.
            delta: What is added to them.
            out: Where the result goes.
            target: Its dtype.
            first: Place of the first element in the tensor.
            scale: Write (W + delta) / scale: one number, or one per element.

        Raises:
            FormatError: a weight is NaN or infinite, or the change is too large for float32.
        """
        overflow = 0
        for begin in range(0, len(out), PIECE):
            window = slice(begin, begin + PIECE)
            own = scale if scale is None or len(scale) == 1 else scale[window]
            overflow += self._write(item, weight[window], delta[window], out[window], target, first + begin, own)
        step = len(out) // SAMPLE | 1  # odd, so that it meets all columns
        wanted = delta[::step].astype(np.float64)
        written = _values(out[::step], target)
        if scale is not None:
            written *= scale if len(scale) == 1 else scale[::step]
        change = written - decode(weight[::step], item.spec.dtype)
        self._count(item.key, overflow, float(change @ wanted), float(wanted @ wanted))

    def _write(
        self, item: Input, weight: Raw, delta: Singles, out: Raw, target: str, first: int, scale: Doubles | None
    ) -> int:
        """At most PIECE elements; how many were clamped."""
        dtype = item.spec.dtype
        if self._seed is None and scale is None and target in FORMATS:
            try:
                return self._sum(dtype, target)([weight, delta.view(np.uint32)], out, Scratch.of_thread())
            except NonFiniteError:
                raise refused(item, weight) from None
        total = decode(weight, dtype) + delta
        if scale is not None:
            total /= scale
        noise = None if self._seed is None else Noise(self._seed, item.key, first).words(0, len(out))
        counts = cast(total.view(np.uint64), "F64", out, target, noise)
        if counts.nan or counts.infinite:
            raise refused(item, weight)
        return counts.overflow

    def _sum(self, dtype: str, target: str) -> ExactSum:
        if (dtype, target) not in self._sums:
            self._sums[dtype, target] = ExactSum([Fraction(1), Fraction(1)], [dtype, "F32"], target)
        return self._sums[dtype, target]

    def _count(self, key: str, overflow: int, got: float, wanted: float) -> None:
        with self._lock:
            if overflow:
                self.overflows[key] = self.overflows.get(key, 0) + overflow
            before = self._kept.get(key, (0.0, 0.0))
            self._kept[key] = before[0] + got, before[1] + wanted


def refused(item: Input, weight: Raw) -> FormatError:
    """The error for a weight with NaN or infinity, or else for a change that is too large for float32."""
    nan, infinite = count_nonfinite(weight, item.spec.dtype)
    if nan or infinite:
        return nonfinite(item, nan, infinite)
    return FormatError(
        f"what is to be added to `{item.key}` is too large for float32", hint="use a smaller strength", key=item.key
    )


def fp8_scale(largest: Singles, dtype: str) -> Singles:
    """The scales with which the largest magnitudes become the largest code; 1 for zeros."""
    scale: Singles = np.where(largest > 0, largest / np.float32(WRITABLE[dtype][2]), np.float32(1)).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def _values(raw: Raw, dtype: str) -> Doubles:
    if dtype in FP8:
        values: Doubles = fp8_values(dtype)[raw].astype(np.float64)
        return values
    return decode(raw, dtype)
