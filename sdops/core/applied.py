"""A model with changes added to its weights, as a Source: W' = round(W + sum of all changes), rounded once.

Two kinds of change, which a tensor may have any number of:

    LowRank   some rows change by up @ down. Made in numpy for a few rows at a time, so that a piece needs a piece's
              memory whatever the tensor's size.
    Dense     a function of the weight. The whole tensor is made at once.

Changes are made and added up in float32; W + delta is exact and rounded once (core.exact), or rounded at random so
that nothing is lost on average. All changes see the original W, so that their order does not matter, unless
`sequential` asks for what most programs do: every change sees the weight as the ones before left it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.casting import cast, raw_dtype
from sdops.core.exact import PIECE, ExactSum, NonFiniteError, Scratch
from sdops.core.fp8 import WRITABLE, fp8_values
from sdops.core.inputs import nonfinite
from sdops.core.noise import Noise
from sdops.core.plan import Input
from sdops.core.precision import FORMATS, Doubles, Raw, count_nonfinite, decode, encode
from sdops.core.run import piece_bytes
from sdops.core.source import Source, aligned, splits
from sdops.core.spec import FP8, Spec
from sdops.core.views import View
from sdops.errors import FormatError

Singles = NDArray[np.float32]
Factors = tuple[Singles, Singles]  # up [rows, r], down [r, columns]; scale and strength are in them
Weights = Callable[[str], Singles]  # tensor of the model -> its values, in its shape

SAMPLE = 4096  # elements of a piece from which is told what survived the rounding
REMEMBERED = 4  # tensors whose factors are kept: pieces of one come in a row, in several threads


@dataclass(frozen=True, slots=True)
class LowRank:
    """Rows `start .. start + rows` of a tensor, as a matrix [o, i kh kw], change by up @ down.

    Attributes:
        start, rows: Which rows.
        factors: Makes up [rows, r] and down [r, i kh kw].
    """

    start: int
    rows: int
    factors: Callable[[], Factors]


@dataclass(frozen=True, slots=True)
class Dense:
    """A change that is made for all rows at once.

    Attributes:
        delta: Makes the change [o, i kh kw]; may ask for weights.
    """

    delta: Callable[[Weights], Singles]


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a tensor.

    Attributes:
        spec: Of the result; a shape larger than the model's is filled up with zeros before anything is added.
        terms: What is added.
        scale: For fp8: the tensor that holds the scale of this one, one number or one per row. It is made anew, so that
            the largest magnitude becomes the largest code.
    """

    spec: Spec
    terms: tuple[LowRank | Dense, ...]
    scale: str = ""


class Applied(View):
    """The Source of a model with changes.

    Args:
        source: The model as it is written where nothing changes.
        changes: Tensor -> what is added.
        weights: Where the weights of changed tensors are read, if not there: `core.views.Dequantised`, or a merge
            with more digits. They must be F64, F32, F16 or BF16.
        sequential: Every dense change sees the weight with the ones before it.
        seed: Round at random, keyed by seed, tensor and element, instead of to nearest.

    Attributes:
        overflows: Tensor -> number of elements that were too large for the output dtype and were clamped.
    """

    def __init__(
        self,
        source: Source,
        changes: Mapping[str, Change],
        *,
        weights: Source | None = None,
        sequential: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(source, {k: changes[k].spec if k in changes else spec for k, spec in source.specs.items()})
        self.changes = changes
        self.weights = source if weights is None else weights
        self._scaled = {change.scale: key for key, change in changes.items() if change.scale}
        self.overflows: dict[str, int] = {}
        self._sequential = sequential
        self._seed = seed
        self._kept: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._factors: OrderedDict[str, list[tuple[int, Singles, Singles]]] = OrderedDict()
        self._sums: dict[tuple[str, str], ExactSum] = {}
        self._whole: tuple[str, bytearray] = ("", bytearray())

    # ------------------------------------------------------------------------------------------- what core.run asks

    @property
    def forks(self) -> bool:
        """Whether forked processes may do the work: everything is numpy's, and the model lies in files."""
        dense = any(isinstance(term, Dense) for change in self.changes.values() for term in change.terms)
        return not dense and not any(hasattr(each, "piece_bytes") for each in (self.source, self.weights))

    def tally(self) -> Any:
        """What was counted in this process."""
        return self.overflows, self._kept

    def add(self, tally: Any) -> None:
        """Add what another process counted."""
        overflows, kept = tally
        for key, overflow in overflows.items():
            self._count(key, overflow, *kept.get(key, (0.0, 0.0)))
        for key in kept.keys() - overflows.keys():
            self._count(key, 0, *kept[key])

    def piece_bytes(self, key: str) -> int:
        """Portions in which the tensor is made: some rows, or all of them."""
        if key not in self.changes:
            return piece_bytes(self.source, key)
        spec = self.specs[key]
        if self._is_whole(key):
            return max(spec.nbytes, 1)
        return self._piece(key) * raw_dtype(spec.dtype).itemsize

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        if key in self.changes:
            return splits(self.weights, key) and not self._is_whole(key)
        return splits(self.source, key)

    def kept(self) -> dict[str, float]:
        """Tensor -> share of the change that survived the rounding, <W' - W, delta> / <delta, delta>, sampled."""
        return {key: got / wanted for key, (got, wanted) in self._kept.items() if wanted}

    def kept_overall(self) -> float | None:
        """The same of all tensors together; None before anything was read."""
        got, wanted = (sum(each[i] for each in self._kept.values()) for i in (0, 1))
        return got / wanted if wanted else None

    # ------------------------------------------------------------------------------------------------------ reading

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the model's, with the changes.

        Raises:
            FormatError: a weight is NaN or infinite.
        """
        if key in self._scaled:
            buffer[:] = memoryview(self._scale_bytes(key))[start : start + len(buffer)]
        elif key not in self.changes:
            self.source.read_into(key, start, buffer)
        elif not self._is_whole(key):
            self._read_pieces(key, start, buffer)
        elif len(buffer) == self.specs[key].nbytes:
            self._make_whole(key, buffer)
        else:
            with self._lock:
                name, data = self._whole
            if name != key:
                data = bytearray(self.specs[key].nbytes)
                self._make_whole(key, memoryview(data))
                with self._lock:
                    self._whole = key, data
            buffer[:] = memoryview(data)[start : start + len(buffer)]

    def _is_whole(self, key: str) -> bool:
        """Whether the tensor is made at once."""
        change = self.changes[key]
        grows = change.spec.shape != self.weights.specs[key].shape
        return grows or bool(change.scale) or any(isinstance(term, Dense) for term in change.terms)

    def _piece(self, key: str) -> int:
        """Elements made at once: as many rows as fit the cache, or what a source that computes wants to be read in."""
        if hasattr(self.weights, "piece_bytes"):
            return max(1, piece_bytes(self.weights, key) // raw_dtype(self.weights.specs[key].dtype).itemsize)
        columns = _matrix(self.specs[key].shape)[1]
        return PIECE // columns * columns or PIECE

    def _read_pieces(self, key: str, start: int, buffer: memoryview) -> None:
        """Low-rank changes, a few rows at a time."""
        out = np.frombuffer(buffer, raw_dtype(self.specs[key].dtype))
        step, first = self._piece(key), start // out.itemsize
        for begin in range(0, len(out), step):
            part = out[begin : begin + step]
            weight = self._raw(key, first + begin, len(part))
            self._round(key, weight, self._low_rank(key, first + begin, len(part)), part, first + begin)

    def _low_rank(self, key: str, first: int, count: int) -> Singles:
        """Elements `first .. first + count` of the sum of all up @ down, in this thread's buffer."""
        columns = _matrix(self.specs[key].shape)[1]
        top, bottom = first // columns, -(-(first + count) // columns)
        total = self._buffer("total", (bottom - top) * columns).reshape(-1, columns)
        factors = self._loaded(key)
        if len(factors) > 1 or factors[0][0] > top or factors[0][0] + len(factors[0][1]) < bottom:
            total.fill(0)
        else:
            np.matmul(factors[0][1][top - factors[0][0] : bottom - factors[0][0]], factors[0][2], out=total)
            factors = []
        for start, up, down in factors:
            begin, end = max(top, start), min(bottom, start + len(up))
            if begin < end:
                product = self._buffer("product", (end - begin) * columns).reshape(-1, columns)
                total[begin - top : end - top] += np.matmul(up[begin - start : end - start], down, out=product)
        return total.reshape(-1)[first - top * columns :][:count]

    def _loaded(self, key: str) -> list[tuple[int, Singles, Singles]]:
        """First row, up, down of all low-rank terms; those of the same rows side by side: one product for all."""
        with self._lock:
            if key not in self._factors:
                rows: dict[tuple[int, int], list[Factors]] = {}
                for term in self.changes[key].terms:
                    if isinstance(term, LowRank):
                        rows.setdefault((term.start, term.rows), []).append(term.factors())
                self._factors[key] = [
                    (start, *(found[0] if len(found) == 1 else _side_by_side(found)))
                    for (start, _), found in rows.items()
                ]
                while len(self._factors) > REMEMBERED:
                    self._factors.popitem(last=False)
            return self._factors[key]

    def _make_whole(self, key: str, buffer: memoryview) -> None:
        """All terms of a tensor, in order."""
        raw, delta = self._total(key)
        out = np.frombuffer(buffer, raw_dtype(self.specs[key].dtype))
        if self.changes[key].scale:
            self._round_scaled(key, raw, delta, out)
        else:
            self._round(key, raw, delta, out, 0)

    def _total(self, key: str) -> tuple[Raw, Singles]:
        """The weight's bit patterns and what is added, flat."""
        shape, own = self.specs[key].shape, self.weights.specs[key]
        raw = _padded(self._raw(key, 0, own.numel).copy(), own.shape, shape)
        weight = _singles(raw, own.dtype).reshape(shape)
        delta = np.zeros(_matrix(shape), np.float32)
        for term in self.changes[key].terms:
            if isinstance(term, LowRank):
                up, down = term.factors()
                delta[term.start : term.start + term.rows] += up @ down
            else:
                seen = weight + delta.reshape(shape) if self._sequential else weight
                delta += term.delta(partial(self._weight, own=(key, seen)))
        return raw, delta.reshape(-1)

    def _weight(self, key: str, *, own: tuple[str, Singles]) -> Singles:
        """A tensor of the model as float32, in its shape; that of `own` is given."""
        if key == own[0]:
            return own[1]
        spec = self.weights.specs[key]
        return _singles(self._raw(key, 0, spec.numel), spec.dtype).reshape(spec.shape)

    def _raw(self, key: str, first: int, count: int) -> Raw:
        """Bit patterns of some elements of the model's tensor, in this thread's buffer."""
        raw = raw_dtype(self.weights.specs[key].dtype)
        size = raw.itemsize
        if len(getattr(self._local, "raw", b"")) < count * size:
            self._local.raw = aligned(count * size)
        view: memoryview = self._local.raw[: count * size]
        step = piece_bytes(self.weights, key)
        for begin in range(0, len(view), step):
            self.weights.read_into(key, first * size + begin, view[begin : begin + step])
        return np.frombuffer(view, raw)

    def _buffer(self, name: str, count: int) -> Singles:
        """This thread's buffer of that name, grown as needed."""
        if len(getattr(self._local, name, ())) < count:
            setattr(self._local, name, np.empty(count, np.float32))
        buffer: Singles = getattr(self._local, name)
        return buffer[:count]

    # ----------------------------------------------------------------------------------------------------- rounding

    def _round(self, key: str, weight: Raw, delta: Singles, out: Raw, first: int) -> None:
        """Write W + delta, rounded once, and account for what survived."""
        overflow = 0
        for begin in range(0, len(out), PIECE):
            window = slice(begin, begin + PIECE)
            overflow += self._round_piece(key, weight[window], delta[window], out[window], first + begin)
        self._count(
            key, overflow, *_projection(weight, delta, out, self.weights.specs[key].dtype, self.specs[key].dtype)
        )

    def _round_piece(self, key: str, weight: Raw, delta: Singles, out: Raw, first: int) -> int:
        """At most PIECE elements; how many were clamped."""
        dtype, target = self.weights.specs[key].dtype, self.specs[key].dtype
        if self._seed is None and target in FORMATS:
            try:
                return self._sum(dtype, target)([weight, delta.view(np.uint32)], out, Scratch.of_thread())
            except NonFiniteError as error:
                raise self._nonfinite(key, weight if error.index == 0 else None) from None
        noise = None if self._seed is None else Noise(self._seed, key, first).words(0, len(out))
        total = decode(weight, dtype) + delta
        counts = cast(total.view(np.uint64), "F64", out, target, noise)
        if counts.nan or counts.infinite:
            raise self._nonfinite(key, weight if sum(count_nonfinite(weight, dtype)) else None)
        return counts.overflow

    def _round_scaled(self, key: str, weight: Raw, delta: Singles, out: Raw) -> None:
        """Write (W + delta) / scale as fp8."""
        dtype, target = self.weights.specs[key].dtype, self.specs[key].dtype
        total = (decode(weight, dtype) + delta).reshape(_matrix(self.specs[key].shape))
        scale = self._scale(key, total)
        noise = None if self._seed is None else Noise(self._seed, key).words(0, len(out))
        scaled = np.ascontiguousarray(total / scale).reshape(-1)
        overflow = cast(scaled.view(np.uint64), "F64", out, target, noise).overflow
        wanted = delta.astype(np.float64)
        change = (_values(out, target).reshape(total.shape) * scale).reshape(-1) - decode(weight, dtype)
        self._count(key, overflow, float(change @ wanted), float(wanted @ wanted))

    def _scale(self, key: str, total: Doubles) -> Doubles:
        """Largest magnitude / largest code: [1, 1], or [rows, 1] where the model has one per row."""
        largest = WRITABLE[self.specs[key].dtype][2]
        per_row = self.specs[self.changes[key].scale].numel > 1
        most = np.abs(total).max(axis=1, keepdims=True) if per_row else np.abs(total).max(keepdims=True)
        if not np.isfinite(most).all():
            raise self._nonfinite(key, None)
        scale: Doubles = np.where(most > 0, most / largest, 1.0).astype(np.float32).astype(np.float64)
        return scale

    def _scale_bytes(self, name: str) -> bytes:
        """The scale of an fp8 tensor, made anew."""
        key = self._scaled[name]
        weight, delta = self._total(key)
        total = (decode(weight, self.weights.specs[key].dtype) + delta).reshape(_matrix(self.specs[key].shape))
        bits, _ = encode(self._scale(key, total).reshape(-1), self.specs[name].dtype)
        return bits.tobytes()

    def _nonfinite(self, key: str, weight: Raw | None) -> FormatError:
        """The error for a weight with NaN or infinity, or for a change that is too large for float32."""
        if weight is not None:
            return nonfinite(Input(self.weights, key, 0), *count_nonfinite(weight, self.weights.specs[key].dtype))
        return FormatError(
            f"what is to be added to `{key}` is too large for float32", hint="use a smaller strength", key=key
        )

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


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[o, i kh kw] of any shape; vectors are one column."""
    return (shape[0] if shape else 1), prod(shape[1:])


def _side_by_side(found: list[Factors]) -> Factors:
    """Several up @ down as one: [up1 up2 ...] @ [down1; down2; ...]."""
    return np.concatenate([up for up, _ in found], axis=1), np.concatenate([down for _, down in found])


def _padded(values: NDArray[Any], shape: tuple[int, ...], wanted: tuple[int, ...]) -> NDArray[Any]:
    """Flat elements of a tensor, filled up with zeros to a larger shape."""
    if shape == wanted:
        return values
    larger = np.zeros(wanted, values.dtype)
    larger[tuple(map(slice, shape))] = values.reshape(shape)
    return larger.reshape(-1)


def _projection(weight: Raw, delta: Singles, out: Raw, dtype: str, target: str) -> tuple[float, float]:
    """<W' - W, delta> and <delta, delta> of some elements, evenly spread; an odd step meets all columns."""
    step = len(out) // SAMPLE | 1
    wanted = delta[::step].astype(np.float64)
    change = _values(out[::step], target) - _values(weight[::step], dtype)
    return float(change @ wanted), float(wanted @ wanted)


def _singles(raw: Raw, dtype: str) -> Singles:
    values: Singles = decode(raw, dtype).astype(np.float32)
    return values


def _values(raw: Raw, dtype: str) -> Doubles:
    if dtype in FP8:
        values: Doubles = fp8_values(dtype)[raw].astype(np.float64)
        return values
    return decode(raw, dtype)
