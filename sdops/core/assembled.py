"""A Source whose tensors are put together from rows of others: ranges of bytes, nothing is computed.

Fused and split matrices, halves that change places, and other shapes of the same numbers are all ranges, so a piece of
any size can be read without the rest. Only a transposed matrix is made as a whole; those that exist are small.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sdops.core.source import Source, read, splits
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import MismatchError

_KEPT = 4  # transposed matrices held at the same time


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of a tensor, or of its transpose."""

    source: Source
    key: str
    start: int
    stop: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor and the ranges that make it, one behind the other."""

    spec: Spec
    ranges: tuple[Range, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is another tensor as it is, its name apart."""
        first = self.ranges[0]
        same = len(self.ranges) == 1 and not first.transposed and (first.start, first.stop) == (0, self.spec.nbytes)
        return same and self.spec == first.source.specs[first.key]

    def shaped(self, shape: tuple[int, ...]) -> Made:
        """The same numbers in another shape."""
        return replace(self, spec=Spec(self.spec.dtype, shape))


def rows(source: Source, key: str, share: tuple[int, int, int] | None = None, operation: str = "") -> Made:
    """Some rows of a tensor, and what is done with them.

    Args:
        source: Where it is.
        key: Its name there.
        share: Rows start/total .. stop/total of its dim 0; None = all.
        operation: "" | "swap" (the halves of the rows) | "transpose" (2-D) | "linear" (drop trailing sizes of 1: a 1x1
            convolution becomes a matrix) | "conv" (append sizes of 1 up to four).

    Raises:
        MismatchError: the tensor's shape does not allow it.
    """
    spec = source.specs[key]
    if share is not None:
        start, stop, total = share
        _check(bool(spec.shape) and spec.shape[0] % total == 0, key, spec, f"{total} equal groups of rows")
        count = spec.shape[0] // total
        made = _made(source, key, count * start, count * stop)
    else:
        made = Made(spec, (Range(source, key, 0, spec.nbytes),))
    shape = made.spec.shape
    if operation == "swap":
        _check(bool(shape) and shape[0] % 2 == 0 and share is None, key, spec, "two halves of rows")
        halves = [_made(source, key, *half) for half in ((shape[0] // 2, shape[0]), (0, shape[0] // 2))]
        return joined(halves)
    if operation == "transpose":
        _check(len(shape) == 2 and share is None and DTYPE_BITS[spec.dtype] >= 8, key, spec, "rows and columns")
        return Made(Spec(spec.dtype, shape[::-1]), (replace(made.ranges[0], transposed=True),))
    if operation == "linear":
        _check(len(shape) >= 2 and all(size == 1 for size in shape[2:]), key, spec, "a kernel of 1x1")
        return made.shaped(shape[:2])
    if operation == "conv":
        return made.shaped(shape + (1,) * (4 - len(shape)))
    return made


def joined(parts: Sequence[Made]) -> Made:
    """Tensors one below the other along dim 0.

    Raises:
        MismatchError: their dtypes or the sizes of their rows differ.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.spec.dtype != first.spec.dtype or part.spec.shape[1:] != first.spec.shape[1:]:
            keys = f"`{first.ranges[0].key}` is {first.spec}, `{part.ranges[0].key}` is {part.spec}"
            raise MismatchError(
                f"{keys}: they cannot be rows of one tensor",
                hint="`--dtype` gives all tensors one dtype; `sdops inspect -v` shows shapes",
            )
    if len(parts) == 1:
        return first
    shape = (sum(part.spec.shape[0] for part in parts), *first.spec.shape[1:])
    return Made(Spec(first.spec.dtype, shape), tuple(each for part in parts for each in part.ranges))


def _made(source: Source, key: str, start: int, stop: int) -> Made:
    """Rows [start, stop) of a tensor."""
    spec = source.specs[key]
    row = spec.nbytes // max(spec.shape[0], 1)
    part = Range(source, key, start * row, stop * row)
    return Made(Spec(spec.dtype, (stop - start, *spec.shape[1:])), (part,))


def _check(fits: bool, key: str, spec: Spec, what: str) -> None:
    if not fits:
        raise MismatchError(
            f"`{key}` is {spec}, which has not {what}",
            hint="`sdops inspect` says what the file is and what is unusual about it",
            key=key,
        )


class Assembled:
    """Tensors made of ranges of others.

    Args:
        name: How messages call it.
        tensors: Name -> how it is made.
        metadata: Text that comes along.
    """

    def __init__(self, name: str, tensors: Mapping[str, Made], metadata: Mapping[str, str]) -> None:
        self.name = name
        self.tensors = tensors
        self.specs: Mapping[str, Spec] = {key: made.spec for key, made in tensors.items()}
        self.metadata = metadata
        self._lock = threading.Lock()
        self._transposed: dict[tuple[int, str], bytes] = {}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from the ranges that bytes `[start, start + len(buffer))` lie in."""
        position, done = 0, 0  # of the range at hand, and bytes that are there
        for part in self.tensors[key].ranges:
            size = part.stop - part.start
            begin = start + done - position
            if begin < size and done < len(buffer):
                view = buffer[done : done + size - begin]
                self._read(part, part.start + begin, view)
                done += len(view)
            position += size

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        return all(not part.transposed and splits(part.source, part.key) for part in self.tensors[key].ranges)

    def close(self) -> None:
        """Close the sources."""
        for source in {id(part.source): part.source for made in self.tensors.values() for part in made.ranges}.values():
            source.close()

    def _read(self, part: Range, start: int, view: memoryview) -> None:
        if not part.transposed:
            part.source.read_into(part.key, start, view)
            return
        with self._lock:
            place = id(part.source), part.key
            if place not in self._transposed:
                if len(self._transposed) >= _KEPT:
                    self._transposed.pop(next(iter(self._transposed)))
                self._transposed[place] = _transpose(part.source, part.key)
            view[:] = self._transposed[place][start : start + len(view)]


def _transpose(source: Source, key: str) -> bytes:
    """The bytes of a matrix, column by column."""
    spec = source.specs[key]
    height, width = spec.shape
    data, size = memoryview(read(source, key)), DTYPE_BITS[spec.dtype] // 8
    if size in _CODES:
        elements = data.cast(_CODES[size])
        out = memoryview(bytearray(len(data))).cast(_CODES[size])
        for column in range(width):
            out[column * height : (column + 1) * height] = elements[column::width]
        return bytes(out)
    raise MismatchError(f"`{key}` is {spec}, which cannot be transposed", hint="`--dtype` changes the dtype", key=key)


_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Constants:
    """Tensors whose bytes are at hand, as a Source.

    Args:
        name: How messages call it.
        tensors: Name -> (spec, bytes).
    """

    def __init__(self, name: str, tensors: Mapping[str, tuple[Spec, bytes]]) -> None:
        self.name = name
        self.specs: Mapping[str, Spec] = {key: spec for key, (spec, _) in tensors.items()}
        self.metadata: Mapping[str, str] = {}
        self._bytes = {key: data for key, (_, data) in tensors.items()}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Copy the bytes."""
        buffer[:] = self._bytes[key][start : start + len(buffer)]

    def close(self) -> None:
        """Nothing to release."""
