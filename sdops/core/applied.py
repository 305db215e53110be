"""A model with changes added to its weights, as a Source: W' = round(W + sum of all changes), rounded once.

Two kinds of change, which a tensor may have any number of:

    LowRank   some rows change by up @ down. Made a few rows at a time (core.product), so that a piece needs a piece's
              memory whatever the tensor's size.
    Dense     a function of the weight. The whole tensor is made at once.

Changes are made and added up in float32, products in float64; W + delta is exact and rounded once (core.exact), or
rounded at random so that nothing is lost on average. All changes see the original W, so that their order does not
matter, unless `sequential` asks for what most programs do: every change sees the weight as the ones before left it.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.adding import Adder, Tally, fp8_scale, refused
from sdops.core.casting import raw_dtype
from sdops.core.chain import Link, Links, link
from sdops.core.exact import PIECE
from sdops.core.plan import Input
from sdops.core.precision import FORMATS, Doubles, Raw, Singles, decode, encode
from sdops.core.product import Product, Term, multiply
from sdops.core.run import piece_bytes
from sdops.core.source import Source, aligned, splits
from sdops.core.spec import Spec
from sdops.core.view import View

Rows = Callable[[int, int], Singles]  # first, one past the last -> these rows of up, [rows, r]
Factors = tuple[Rows, Singles]  # of up, and down [r, columns]; scale and strength are in them
Loaded = tuple[int, int, Rows, Singles]  # first row, rows, and what is added to them
Weights = Callable[[str], Singles]  # tensor of the model -> its values, in its shape

KEPT = 3  # tensors whose factors are kept: threads work on pieces of one, or of some that follow each other


@dataclass(frozen=True, slots=True)
class LowRank:
    """Rows `start .. start + rows` of a tensor, as a matrix [o, i kh kw], change by up @ down.

    Attributes:
        start, rows: Which rows.
        factors: Gives rows of up [rows, r], and down [r, i kh kw].
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
        adder: What it counted: overflows, and the share of the changes that survived.
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
        self.adder = Adder(seed)
        self._sequential = sequential
        self._scaled = {change.scale: key for key, change in changes.items() if change.scale}
        self._scales = _shared({key: source.specs[name].numel for name, key in self._scaled.items()})
        self._lock = threading.Lock()
        self._local = threading.local()
        self._loaded: OrderedDict[str, list[Loaded]] = OrderedDict()
        self._whole: tuple[str, bytearray] = ("", bytearray())

    # ------------------------------------------------------------------------------------------- what core.run asks

    @property
    def forks(self) -> bool:
        """Whether forked processes may do the work: everything is numpy's, and the model lies in files."""
        dense = any(isinstance(term, Dense) for change in self.changes.values() for term in change.terms)
        return not dense and not any(hasattr(each, "piece_bytes") for each in (self.source, self.weights))

    def tally(self) -> Tally:
        """What was counted in this process."""
        return self.adder.tally()

    def add(self, tally: Tally) -> None:
        """Add what another process counted."""
        self.adder.add(tally)

    def piece_bytes(self, key: str) -> int:
        """Portions in which the tensor is made: some rows, or all of them."""
        if key not in self.changes:
            return piece_bytes(self.source, key)
        spec = self.specs[key]
        if self._is_whole(key):
            return max(spec.nbytes, 1)
        return self._portion(key) * raw_dtype(spec.dtype).itemsize

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        if key in self.changes:
            return splits(self.weights, key) and not self._is_whole(key)
        return splits(self.source, key)

    def link(self, key: str, links: Links) -> Link | None:
        """How a tensor is made of others, if that is a sum; see core.chain."""
        change = self.changes.get(key)
        if change is None:
            return None if key in self._scaled else link(self.source, key, links)
        dtypes = {change.spec.dtype, self.weights.specs[key].dtype}
        if self._is_whole(key) or not self.adder.is_exact or not dtypes <= FORMATS.keys():
            return None
        delta = Link("F32", product=self._product(key))
        return Link(change.spec.dtype, None, ((Fraction(1), link(self.weights, key, links)), (Fraction(1), delta)))

    # ------------------------------------------------------------------------------------------------------ reading

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the model's, with the changes.

        Raises:
            FormatError: a weight is NaN or infinite.
        """
        if key in self._scaled:
            bits, _ = encode(self._scale(self._scaled[key]), self.specs[key].dtype)
            buffer[:] = memoryview(bits.tobytes())[start : start + len(buffer)]
        elif key not in self.changes:
            self.source.read_into(key, start, buffer)
        elif self._is_whole(key) and len(buffer) < self.specs[key].nbytes:
            buffer[:] = self._remembered(key)[start : start + len(buffer)]
        else:
            self._make(key, start, buffer)

    def _remembered(self, key: str) -> memoryview:
        """A tensor that is made at once, for those who read it in pieces."""
        with self._lock:
            name, data = self._whole
        if name != key:
            data = bytearray(self.specs[key].nbytes)
            self._make(key, 0, memoryview(data))
            with self._lock:
                self._whole = key, data
        return memoryview(data)

    def _make(self, key: str, start: int, buffer: memoryview) -> None:
        """Weights and changes, put together portion by portion."""
        out = np.frombuffer(buffer, raw_dtype(self.specs[key].dtype))
        item, target, origin = Input(self.weights, key, 0), self.specs[key].dtype, start // out.itemsize
        scale = self._scale(key) if self.changes[key].scale else None
        columns = _matrix(self.specs[key].shape)[1]
        with np.errstate(over="ignore", invalid="ignore"):  # the adder looks for what is not finite
            for first, weight, delta in self._portions(key, origin, len(out)):
                part = out[first - origin :][: len(delta)]
                own = scale
                if scale is not None and len(scale) > 1:  # one per row
                    own = scale[np.arange(first, first + len(part)) // columns]
                self.adder.write(item, weight, delta, part, target, first, own)

    def _portions(self, key: str, first: int, count: int) -> Iterator[tuple[int, Raw, Singles]]:
        """Place, bit patterns of the weight, and what is added, in portions; valid until the next one."""
        if self._is_whole(key):
            yield 0, *self._whole_change(key)
            return
        step = self._portion(key)
        for begin in range(first, first + count, step):
            size = min(step, first + count - begin)
            delta = self._buffer(size)
            multiply(self._product(key), begin, delta)
            yield begin, self._raw(key, begin, size), delta

    def _portion(self, key: str) -> int:
        """Elements made at once: as many rows as fit the cache, or what a source that computes wants to be read in."""
        if hasattr(self.weights, "piece_bytes"):
            return max(1, piece_bytes(self.weights, key) // raw_dtype(self.weights.specs[key].dtype).itemsize)
        columns = _matrix(self.specs[key].shape)[1]
        return min(max(PIECE // columns, 1) * columns, PIECE)

    def _is_whole(self, key: str) -> bool:
        """Whether the tensor is made at once."""
        change = self.changes[key]
        grows = change.spec.shape != self.weights.specs[key].shape
        return grows or any(isinstance(term, Dense) for term in change.terms)

    def _scale(self, key: str) -> Doubles:
        """The scale of an fp8 tensor: one number, or one per row."""
        found = self._scales[key]
        if (found < 0).any():
            most, columns = np.zeros(len(found)), _matrix(self.specs[key].shape)[1]
            for first, weight, delta in self._portions(key, 0, self.specs[key].numel):
                magnitude = np.abs(decode(weight, self.weights.specs[key].dtype) + delta)
                if not np.isfinite(magnitude).all():
                    raise refused(Input(self.weights, key, 0), weight)
                rows = np.arange(first, first + len(magnitude)) // columns if len(most) > 1 else 0
                np.maximum.at(most, rows, magnitude if len(most) > 1 else magnitude.max())
            scale = fp8_scale(most.astype(np.float32), self.specs[key].dtype).astype(np.float64)
            dtype = self.specs[self.changes[key].scale].dtype
            found[:] = decode(encode(scale, dtype)[0], dtype)  # as whoever reads the file will see it
        return found.astype(np.float64)

    def _product(self, key: str) -> Product:
        """The sum of all up @ down."""
        return Product(_matrix(self.specs[key].shape)[1], partial(self._terms, key))

    def _terms(self, key: str, top: int, bottom: int) -> list[Term]:
        """What rows `top .. bottom` of the sum of all up @ down are made of."""
        terms = []
        for start, rows, up, down in self.loaded(key):
            begin, end = max(top, start), min(bottom, start + rows)
            if begin < end:
                terms.append(_term(begin, up(begin - start, end - start), down))
        return terms

    def loaded(self, key: str) -> list[Loaded]:
        """First row, rows and factors of all low-rank terms; kept for a few tensors, whose pieces threads share."""
        with self._lock:
            if key not in self._loaded:
                terms = [term for term in self.changes[key].terms if isinstance(term, LowRank)]
                self._loaded[key] = [(term.start, term.rows, *term.factors()) for term in terms]
                while len(self._loaded) > KEPT:
                    self._loaded.popitem(last=False)
            return self._loaded[key]

    def _whole_change(self, key: str) -> tuple[Raw, Singles]:
        """The weight's bit patterns and what is added, flat."""
        shape, own = self.specs[key].shape, self.weights.specs[key]
        raw = _padded(self._raw(key, 0, own.numel).copy(), own.shape, shape)
        weight = _singles(raw, own.dtype).reshape(shape)
        delta = np.zeros(_matrix(shape), np.float32)
        for term in self.changes[key].terms:
            if isinstance(term, LowRank):
                delta[term.start : term.start + term.rows] += _made(term)
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

    def _buffer(self, count: int) -> Singles:
        """This thread's buffer for what is added."""
        if len(getattr(self._local, "delta", ())) < count:
            size = max(count, PIECE)  # what is not touched takes no memory; one that grew would leave holes in it
            self._local.delta = np.frombuffer(aligned(4 * size), np.float32)
        buffer: Singles = self._local.delta
        return buffer[:count]


def _made(term: LowRank) -> Singles:
    """up @ down [rows, columns]."""
    up, down = term.factors()
    own = [_term(0, up(0, term.rows), down)]
    made = np.empty((term.rows, down.shape[1]), np.float32)
    multiply(Product(down.shape[1], lambda *_: own), 0, made.reshape(-1))
    return made


def _term(first: int, up: Singles, down: Singles) -> Term:
    return Term(first, np.ascontiguousarray(up), np.ascontiguousarray(down))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[o, i kh kw] of any shape; vectors are one column."""
    return (shape[0] if shape else 1), prod(shape[1:])


def _shared(sizes: Mapping[str, int]) -> dict[str, Singles]:
    """Arrays of numbers still unknown (-1), which forked processes share: what one finds out the others need not."""
    memory = np.frombuffer(mmap.mmap(-1, max(4 * sum(sizes.values()), 1)), np.float32, sum(sizes.values()))
    memory[:] = -1
    found: dict[str, Singles] = {}
    for key, size in sizes.items():
        start = sum(len(each) for each in found.values())
        found[key] = memory[start : start + size]
    return found


def _padded(values: NDArray[Any], shape: tuple[int, ...], wanted: tuple[int, ...]) -> NDArray[Any]:
    """Flat elements of a tensor, filled up with zeros to a larger shape."""
    if shape == wanted:
        return values
    larger = np.zeros(wanted, values.dtype)
    larger[tuple(map(slice, shape))] = values.reshape(shape)
    return larger.reshape(-1)


def _singles(raw: Raw, dtype: str) -> Singles:
    values: Singles = decode(raw, dtype).astype(np.float32)
    return values
