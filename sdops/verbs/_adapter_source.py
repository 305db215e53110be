"""Tensors that are made when they are read: adapters to be written, as a Source for core.run and core.sink."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sdops.core.casting import cast, raw_dtype
from sdops.core.patch import Adapter
from sdops.core.precision import FORMATS, Doubles, decode, encode
from sdops.core.source import Source, read
from sdops.core.spec import DTYPE_BITS, FP8, INTEGERS, Spec
from sdops.dialects import Recipe
from sdops.errors import FormatError

Bits = NDArray[np.unsignedinteger]
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor to be: its spec, and the function that makes its bytes (contiguous, little-endian)."""

    spec: Spec
    make: Callable[[], bytes | bytearray | memoryview]


class AdapterSource:
    """A Source of tensors that are made when they are read, each at once and by one thread.

    Args:
        name: For messages.
        tensors: Name -> what it is and how to make it.
        metadata: Text for the header.
        close: Called when this Source is closed, e.g. the `close` of the Source that it reads.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Lazy],
        metadata: Mapping[str, str],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.specs: Mapping[str, Spec] = {key: lazy.spec for key, lazy in tensors.items()}
        self.metadata = metadata
        self._tensors = tensors
        self._close = close

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Make the tensor, and give its bytes `[start, start + len(buffer))`.

        Raises:
            FormatError: a number in it is NaN, infinite or too large for its dtype.
        """
        data = memoryview(self._tensors[key].make()).cast("B")
        buffer.cast("B")[:] = data[start : start + len(buffer.cast("B"))]

    def piece_bytes(self, key: str) -> int:
        """Everything at once."""
        return max(self.specs[key].nbytes, 1)

    def splits(self, key: str) -> bool:  # noqa: ARG002 -- a Source's question
        """Two threads would both make the whole tensor."""
        return False

    def close(self) -> None:
        """Release what the tensors are made of."""
        self._close()


def lazy(recipe: Recipe, source: Source) -> Lazy:
    """A recipe of the dialects shelf as a tensor to be."""
    return Lazy(recipe.spec, lambda: made(recipe, source))


def made(recipe: Recipe, source: Source) -> bytes | bytearray:
    """The bytes that a recipe describes."""
    copied = recipe.copied
    if copied is not None and source.specs[copied].dtype == recipe.spec.dtype:
        return read(source, copied)
    if recipe.value is not None:
        return _encoded(np.full(recipe.spec.numel, recipe.value), recipe.spec.dtype, "a number")
    moved = all(b.factor == 1.0 and source.specs[b.key].dtype == recipe.spec.dtype for b in recipe.blocks)
    moved = moved and not recipe.offset
    return _moved(recipe, source) if moved else _computed(recipe, source)


def _moved(recipe: Recipe, source: Source) -> bytes:
    """Bit patterns put in place: nothing is rounded, NaN keeps its payload."""
    out = np.zeros(recipe.matrix, _UNSIGNED[DTYPE_BITS[recipe.spec.dtype]])
    for block in recipe.blocks:
        part = _bits(source, block.key)[slice(*block.rows), slice(*block.columns)]
        _put(out, part, block.at)
    return out.tobytes()


def _computed(recipe: Recipe, source: Source) -> bytes:
    """Values times their factors, rounded once."""
    out = np.zeros(recipe.matrix)
    keys = [block.key for block in recipe.blocks]
    for block in recipe.blocks:
        part = values_of(source, block.key)[slice(*block.rows), slice(*block.columns)]
        _put(out, part * block.factor, block.at)
    return _encoded(out.reshape(-1) + recipe.offset, recipe.spec.dtype, keys[0] if keys else "zeros")


def _put(out: NDArray[np.generic], part: NDArray[np.generic], at: tuple[int, int]) -> None:
    out[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]] = part


def _encoded(values: Doubles, dtype: str, key: str) -> bytes:
    bits, overflow = encode(values, dtype)
    if overflow:
        raise FormatError(f"`{key}` becomes too large for {dtype}", hint="write it as fp32", key=key)
    return bits.tobytes()


def _bits(source: Source, key: str) -> Bits:
    """A tensor's bit patterns as a matrix."""
    spec = source.specs[key]
    rows = spec.shape[0] if spec.shape else 1
    return np.frombuffer(read(source, key), _UNSIGNED[DTYPE_BITS[spec.dtype]]).reshape(rows, -1)


def values_of(source: Source, key: str) -> Doubles:
    """A tensor's values as a matrix, float64.

    Raises:
        FormatError: it holds no numbers that can be computed with.
    """
    spec = source.specs[key]
    bits = _bits(source, key)
    if spec.dtype in FORMATS:
        return decode(bits.reshape(-1), spec.dtype).reshape(bits.shape)
    if spec.dtype in INTEGERS and spec.dtype != "BOOL":
        letter = "u" if spec.dtype.startswith("U") else "i"
        return bits.view(f"{letter}{DTYPE_BITS[spec.dtype] // 8}").astype(np.float64)
    raise FormatError(f"`{key}` of `{source.name}` is {spec}, no number", hint="convert the file to fp16", key=key)


def singles_of(source: Source, key: str, rows: tuple[int, int] | None = None) -> NDArray[np.float32]:
    """A tensor's values, or those of some rows, as float32, flat.

    Raises:
        FormatError: it holds NaN or infinity, or no numbers.
    """
    spec = source.specs[key]
    if not (spec.is_float or spec.dtype in FP8):
        part = values_of(source, key)[slice(*rows) if rows else slice(None)]
        found: NDArray[np.float32] = part.astype(np.float32).reshape(-1)
        return found
    raw = np.frombuffer(_rows(source, key, *rows) if rows else read(source, key), raw_dtype(spec.dtype))
    out = np.empty(len(raw), np.float32)
    counts = cast(raw, spec.dtype, out.view(np.uint32), "F32")
    if counts.nan or counts.infinite:
        if rows:
            singles_of(source, key)  # all rows are counted
        raise not_finite(source, key, counts.nan + counts.infinite)
    return out


def _rows(source: Source, key: str, first: int, last: int) -> bytearray:
    """The bytes of some rows of a tensor."""
    size = source.specs[key].nbytes // source.specs[key].shape[0]
    data = bytearray((last - first) * size)
    source.read_into(key, first * size, memoryview(data))
    return data


def not_finite(source: Source, key: str, number: int) -> FormatError:
    """The error for a tensor with NaN or infinity."""
    what = "number that is" if number == 1 else "numbers that are"
    return FormatError(
        f"`{key}` of `{source.name}` holds {number:,} {what} NaN or infinite",
        hint="the training diverged or the file is damaged; use an earlier save",
        key=key,
    )


def check_finite(adapter: Adapter) -> None:
    """Raises FormatError, naming the tensor, if an adapter holds NaN or infinity."""
    for patch in adapter.patches:
        for key in patch.parts.values():
            singles_of(adapter.source, key)


@dataclass(slots=True)
class SourceValues:
    """Answers to the questions that dialects ask on values; see `dialects.Values`."""

    source: Source
    _digests: dict[str, bytes] = field(default_factory=dict)

    def number(self, key: str) -> float:
        """The first element of a tensor."""
        return float(values_of(self.source, key)[0, 0])

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bits."""
        return self.source.specs[first] == self.source.specs[second] and self._digest(first) == self._digest(second)

    def nonzero_columns(self, key: str, rows: tuple[int, int]) -> tuple[int, int]:
        """First and one past the last column with a number other than zero in these rows; (0, 0) if there is none."""
        used = np.flatnonzero((values_of(self.source, key)[slice(*rows)] != 0).any(axis=0))
        return (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)

    def _digest(self, key: str) -> bytes:
        if key not in self._digests:
            self._digests[key] = hashlib.sha256(read(self.source, key)).digest()
        return self._digests[key]
