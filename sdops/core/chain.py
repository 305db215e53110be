"""Sums, and sums of sums in one go: what steps do to an element, each rounded as if it were written and read again.

Step by step, each would work in buffers of its own, and read again what others read, too. Where all of them are exact
sums (core/exact.py), links describe the whole, and compiled code (core/chain.c) takes a block of elements through all
of them. The bits are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from math import lcm
from typing import Protocol

import numpy as np

from sdops.core import native
from sdops.core.exact import SHORT_BITS, short_parts
from sdops.core.precision import FORMATS, Raw
from sdops.core.product import Product
from sdops.core.source import Place, Source, place

MOST_REGISTERS = 32  # REGISTERS of chain.h
BLOCK = 512  # of native.h: whole blocks take less time
ROWS = 4  # of product.c: so many go through a matrix together
PORTION = 1 << 14  # elements that are read at once: of all inputs, they shall fit the second-level cache
GIVEN = 1 << 17  # elements that Python gives at once: fewer calls, and not much memory
FACTORED = 1 << 19  # the same of elements of whose products Python gives the factors
POURED = 1 << 17  # bytes that are written at once

Term = tuple[float, int, int]  # coefficient, register, -log2 of what it is a multiple of
Form = tuple[tuple[str, bool, tuple[tuple[int, int, int], ...]], ...]  # dtype, whether read, terms: c as p / q, operand
Read = Callable[[int, int, memoryview], Raw]  # first element, number of elements, room -> their bit patterns


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A tensor: one that is read, or the rounded sum of others, element by element.

    Attributes:
        dtype: F16, BF16 or F32.
        read: Gives elements, in the room or elsewhere. Of a sum and of a product None.
        terms: Of a sum: coefficients, none of them zero, and what they multiply.
        place: Where compiled code can read the elements instead.
        product: What it makes them of.
    """

    dtype: str
    read: Read | None = None
    terms: tuple[tuple[Fraction, Link], ...] = ()
    place: Place | None = None
    product: Product | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it is made of other links."""
        return self.read is None and self.product is None


Links = dict[tuple[int, str], Link]  # tensors that are known already, by the Source's id and the key


class Linked(Source, Protocol):
    """A Source that knows how its tensors are made of others."""

    def link(self, key: str, links: Links) -> Link | None:
        """How a tensor is made; None if it has to be read."""


def link(source: Source, key: str, links: Links) -> Link:
    """How a tensor of a source is made, or that it is read; the same object whenever it is asked for."""
    identity = id(source), key
    if identity not in links:
        asked = getattr(source, "link", None)  # isinstance would look for every method of the protocol, each time
        made = None if asked is None else asked(key, links)
        if made is not None and made.is_sum and not made.terms:
            made = None  # compiled code adds to the first term
        dtype = source.specs[key].dtype
        links[identity] = made or Link(dtype, partial(_read, source, key), place=place(source, key))
    return links[identity]


def _read(source: Source, key: str, first: int, count: int, room: memoryview) -> Raw:
    raw = FORMATS[source.specs[key].dtype].raw
    size = np.dtype(raw).itemsize
    source.read_into(key, first * size, room[: count * size])
    return np.frombuffer(room[: count * size], raw)


class Chain:
    """A sum of sums, compiled. Safe to use from several threads.

    Args:
        last: What is made: a sum. There must be a compiled library.

    Attributes:
        reads: The tensors that are read, in the order of the rooms.
        portions: For each of these, bytes of what is read at once.
        is_compiled: Whether compiled code can do it: it knows all dtypes, and has registers enough.
    """

    def __init__(self, last: Link) -> None:
        order = _ordered(last)
        self.reads = [one for one in order if not one.is_sum]
        self._sizes = [np.dtype(FORMATS[one.dtype].raw).itemsize for one in self.reads]
        self._places = [one.place for one in self.reads if one.place is not None]
        products = [one.product for one in self.reads if one.product is not None]
        self._needs_python = len(self._places) + len(products) < len(self.reads)
        self._reach = GIVEN if self._needs_python else FACTORED if products else sys.maxsize
        self._portion = min((_portion(product.columns) for product in products), default=PORTION)
        self.portions = [self._portion * size for size in self._sizes]
        self._native = _compiled(_form(order))
        self.is_compiled = self._native is not None

    def __call__(self, first: int, out: Raw, rooms: Sequence[memoryview]) -> bool:
        """Make the elements from `first` on; False if they have to be made step by step.

        Args:
            first: Place of the first element in the tensor.
            out: Where they go.
            rooms: For each tensor that is read, so many elements of any dtype.

        Raises:
            ChangedError: a file was written to since it was opened.
        """
        if self._native is None:
            return False
        elements = range(first, first + len(out))
        for part in self._parts(elements):
            inputs, room = self._inputs(part, rooms), out[part.start - first :][: len(part)].data
            if not self._native(inputs, rooms, self._portion, part, room):
                return False
        self._check()
        return True

    def pour(self, elements: range, rooms: Sequence[memoryview], file: int, position: int) -> bool:
        """Make elements right into a file; False if they have to be made step by step, whatever was written by then.

        Args:
            elements: Which ones.
            rooms: For portions of all tensors that are read, and POURED bytes for the result.
            file: The open file's descriptor.
            position: Of the first element.

        Raises:
            ChangedError: as above.
        """
        if self._native is None or self._needs_python:
            return False
        *own, out = rooms
        for part in self._parts(elements):
            inputs, place = self._inputs(part, own), position + (part.start - elements.start) * self._native.size
            if not self._native(inputs, own, self._portion, part, out, (file, place)):
                return False
        self._check()
        return True

    def _parts(self, elements: range) -> Iterator[range]:
        """What compiled code is asked for at once."""
        for begin in range(elements.start, elements.stop, self._reach):
            yield elements[begin - elements.start :][: self._reach]

    def _check(self) -> None:
        for each in self._places:
            each.check()

    def _inputs(self, elements: range, rooms: Sequence[memoryview]) -> list[native.ChainInput]:
        """For compiled code: where it finds elements, or those that others have read."""
        first, count = elements.start, len(elements)
        found: list[native.ChainInput] = []
        for one, size, room in zip(self.reads, self._sizes, rooms, strict=True):
            if one.place is not None:
                found.append(native.InFile(one.place.file, one.place.position + first * size, size))
            elif one.product is not None:
                found.append(native.InProduct(one.product.terms_for(first, count), one.product.columns, first))
            elif one.read is not None:
                found.append(one.read(first, count, room))
        return found


def _portion(columns: int) -> int:
    """Elements to be made at once of a matrix: about PORTION, many whole rows and many whole blocks of them."""
    return next((PORTION // unit * unit for unit in (lcm(ROWS * columns, BLOCK), columns) if unit <= PORTION), PORTION)


def chain_of(source: Linked, key: str) -> Chain | None:
    """A tensor's chain; None where there is no compiled code for it, or it is one sum of what others read."""
    last = source.link(key, {})
    if last is None or native.library() is None:
        return None
    if not last.terms or not any(operand.terms or operand.place for _, operand in last.terms):
        return None
    chain = Chain(last)
    return chain if chain.is_compiled else None


def _ordered(last: Link) -> list[Link]:
    """All links, each after those that it is made of, and those as late as possible."""
    found: dict[Link, None] = {}
    _visit(last, found)
    return list(found)


def _visit(one: Link, found: dict[Link, None]) -> None:
    if one not in found:
        for _, operand in one.terms:
            _visit(operand, found)  # not a function within `_ordered`: one that calls itself would keep files open
        found[one] = None


def _form(order: Sequence[Link]) -> Form:
    """What tensors that are made alike have in common; fractions as two numbers, whose hashes take less time."""
    numbers = {one: index for index, one in enumerate(order)}
    return tuple(
        (
            one.dtype,
            not one.is_sum,
            tuple([(*c.as_integer_ratio(), numbers[operand]) for c, operand in one.terms]),
        )
        for one in order
    )


@lru_cache(maxsize=64)
def _compiled(form: Form) -> native.NativeChain | None:
    """For chain.c; None if that does not know a dtype, or has too few registers."""
    registers = _registers(form)
    if max(registers) >= MOST_REGISTERS or not {dtype for dtype, _, _ in form} <= set(native.DTYPES):
        return None
    steps: list[tuple[int, ...]] = []
    terms: list[Term] = []
    inputs = 0
    for register, (dtype, is_read, operands) in zip(registers, form, strict=True):
        own = [
            (part, registers[operand], denominator.bit_length() - 1)
            for numerator, denominator, operand in operands
            for part in short_parts(Fraction(numerator, denominator), SHORT_BITS)
        ]
        steps.append((register, inputs if is_read else -1, native.DTYPES.index(dtype), len(terms), len(own)))
        inputs += is_read
        terms += own
    return native.NativeChain(steps, terms)


def _registers(form: Form) -> list[int]:
    """A register for each link, free again after its last use."""
    uses = {operand: index for index, (_, _, terms) in enumerate(form) for *_, operand in terms}
    found: list[int] = []
    free: list[int] = []
    count = 0
    for index, (_, _, terms) in enumerate(form):
        free += sorted({found[operand] for *_, operand in terms if uses[operand] == index}, reverse=True)
        if not free:
            free, count = [count], count + 1
        found.append(free.pop())
    return found
