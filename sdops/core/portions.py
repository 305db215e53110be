"""What all ways to compute a merge in portions share: buffers, inputs that are numbers, and passes over a tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from mmap import PAGESIZE
from typing import Any

from sdops.core.exact import PIECE
from sdops.core.inputs import largest_magnitude, nonfinite, read_raw
from sdops.core.plan import Step
from sdops.core.precision import FORMATS, Raw, count_nonfinite
from sdops.core.source import aligned
from sdops.errors import FormatError


class Room(threading.local):
    """Buffers for the inputs of a portion, each thread's own, used again and again."""

    def __init__(self) -> None:
        self._kept: list[memoryview] = []
        self._whole = memoryview(b"")

    def parts(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """One buffer in parts of so many bytes, each from a page's beginning on.

        Together they take what the most demanding tensor needs; of `buffers` each takes the most that it ever held.
        """
        steps = [-(-size // PAGESIZE) * PAGESIZE for size in sizes]
        if len(self._whole) < sum(steps):
            self._whole = aligned(max(sum(steps), PIECE * 8))
        ends = list(accumulate(steps))
        return [self._whole[end - step : end] for end, step in zip(ends, steps, strict=True)]

    def buffers(self, count: int) -> Sequence[memoryview]:
        """The first so many buffers, each for PIECE elements of any dtype."""
        self._kept += [aligned(PIECE * 8) for _ in range(count - len(self._kept))]
        return self._kept[:count]


class Passes:
    """What a pass over a tensor found, by its key; kept until its last piece has been read."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._lock = threading.Lock()

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, made unless it is kept."""
        with self._lock:
            found = self._found.get(key)
        if found is None:
            found = compute()
            with self._lock:
                self._found[key] = found
        return found

    def forget(self, key: str) -> None:
        """The tensor has been read to its end."""
        with self._lock:
            self._found.pop(key, None)

    def __len__(self) -> int:
        return len(self._found)


def read_raws(step: Step, first: int, count: int, room: Room | None) -> list[Raw]:
    """Bit patterns of the elements [first, first + count) of all inputs; what `room` held before is overwritten.

    Raises:
        FormatError: NaN or infinity among them.
    """
    raws = read_unchecked(step, first, count, room)
    for raw, item in zip(raws, step.inputs, strict=True):
        if largest_magnitude(raw, item.spec.dtype) >= FORMATS[item.spec.dtype].infinity:
            raise nonfinite(item, *count_nonfinite(raw, item.spec.dtype))
    return raws


def read_unchecked(step: Step, first: int, count: int, room: Room | None) -> list[Raw]:
    """The same without a look at the values."""
    buffers = room.buffers(len(step.inputs)) if room else [None] * len(step.inputs)
    return [read_raw(item, first, count, buffer) for item, buffer in zip(step.inputs, buffers, strict=True)]


def check_finite(step: Step, raws: Sequence[Raw]) -> None:
    """Raises FormatError, with counts, for the first input that holds NaN or infinity."""
    for raw, item in zip(raws, step.inputs, strict=True):
        nan, infinite = count_nonfinite(raw, item.spec.dtype)
        if nan + infinite:
            raise nonfinite(item, nan, infinite)


def not_finite(method: str, key: str) -> FormatError:
    """The error for a method that made NaN or infinity of numbers."""
    return FormatError(
        f"`{method}` made values of `{key}` that are not finite",
        hint=f"`--exclude '{key}'` copies the first model's, or change the knobs",
        key=key,
    )
