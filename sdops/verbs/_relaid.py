"""A model seen in other layouts: tensors put together from rows of its own, read piece by piece. No torch, no numpy."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from sdops.core.source import Source, read
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.core.views import View
from sdops.layouts.tables import Part


class Relaid(View):
    """A Source whose tensors are made of those of another one, as the layouts shelf says.

    Args:
        source: What is read.
        made: Name -> the parts that make it, one below the other; their keys are those of the source.
    """

    def __init__(self, source: Source, made: Mapping[str, tuple[Part, ...]]) -> None:
        super().__init__(source, {name: _spec(source, parts) for name, parts in made.items()})
        self.made = made
        self._turned: tuple[str, bytes] = ("", b"")
        self._lock = threading.Lock()

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """From the rows of the source that make it."""
        if self.made[key][0].operation == "transpose":
            buffer[:] = self._transposed(key)[start : start + len(buffer)]
            return
        position = 0  # of a range in the tensor; what lies between `start` and `stop` is wanted
        stop = start + len(buffer)
        for name, begin, end in (found for part in self.made[key] for found in _ranges(self.source, part)):
            first, last = max(start, position), min(stop, position + end - begin)
            if first < last:
                self.source.read_into(name, begin + first - position, buffer[first - start : last - start])
            position += end - begin

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        del key
        return True

    def _transposed(self, key: str) -> bytes:
        """A transposed matrix; the last one is kept, for it is asked for in pieces."""
        with self._lock:
            if self._turned[0] != key:
                name = self.made[key][0].key
                spec = self.source.specs[name]
                data, width = bytes(read(self.source, name)), DTYPE_BITS[spec.dtype] // 8
                row = spec.shape[1] * width
                columns = (data[i : i + width] for j in range(0, row, width) for i in range(j, len(data), row))
                self._turned = key, b"".join(columns)
            return self._turned[1]


def _ranges(source: Source, part: Part) -> Iterator[tuple[str, int, int]]:
    """The byte ranges of the source that make a part, in order."""
    spec = source.specs[part.key]
    start, stop, total = part.share or (0, 1, 1)
    begin, end = (spec.nbytes * row // total for row in (start, stop))
    middle = (begin + end) // 2
    if part.operation == "swap":
        yield part.key, middle, end
        yield part.key, begin, middle
    else:
        yield part.key, begin, end


def _spec(source: Source, parts: tuple[Part, ...]) -> Spec:
    shapes = [_shape(source.specs[part.key].shape, part) for part in parts]
    rows = () if not shapes[0] else (sum(shape[0] for shape in shapes),)
    return Spec(source.specs[parts[0].key].dtype, (*rows, *shapes[0][1:]))


def _shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """The shape that a part has."""
    if part.operation == "transpose":
        return shape[::-1]
    if part.operation == "conv":
        shape = (*shape, 1, 1)
    while part.operation == "linear" and len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if part.share:
        start, stop, total = part.share
        shape = (shape[0] * (stop - start) // total, *shape[1:])
    return shape
