"""Compiled twins of numpy and torch: exact sums (core/exact.py), inner products, random numbers (core/noise.py), tapes.

`libexact.so` is made from the C files of this folder when the package is installed on a machine with a C compiler.
Where it is missing, or the processor is too old for it, `library()` is None and everything works with numpy or torch.
ctypes lets go of Python's lock during a call, so threads really share the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdops import settings
from sdops.core.precision import Raw, Singles
from sdops.core.tape import Program

if TYPE_CHECKING:
    from sdops.core.product import Term

DTYPES = ("F16", "BF16", "F32")  # the order of `enum dtype`
VERSION = 8
MOST_INPUTS = 16  # of `inner`

Words = NDArray[np.uint32]


class InFile(NamedTuple):
    """Where elements lie: position of the first one, and the size of each."""

    file: int
    position: int
    size: int


class InProduct(NamedTuple):
    """What elements are made of: place of the first one in the matrix."""

    terms: Sequence[Term]
    columns: int
    first: int


ChainInput = Raw | InFile | InProduct


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, if there are any that fit this sdops and this processor."""
    path = Path(__file__).with_name("libexact.so")
    if not settings.native() or not path.exists():
        return None
    try:
        found = ctypes.CDLL(str(path))
        found.sdops_sum.restype = ctypes.c_size_t
        found.sdops_tape.restype = ctypes.c_int64
        return found if found.sdops_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def bounds(raw: Raw, dtype: str) -> tuple[int, int] | None:
    """Bit patterns of the largest and of the smallest non-zero magnitude (all ones if every element is zero).

    None where there is no compiled function, or not for this dtype.
    """
    functions = library()
    if functions is None or dtype not in DTYPES:
        return None
    largest, smallest = ctypes.c_uint32(), ctypes.c_uint32()
    functions.sdops_bounds(
        _pointer(raw), DTYPES.index(dtype), ctypes.c_size_t(len(raw)), ctypes.byref(largest), ctypes.byref(smallest)
    )
    return largest.value, smallest.value


class NativeSum:
    """round(sum over terms of coefficient * input) for fixed coefficients and dtypes.

    Args:
        terms: (input, coefficient) pairs, those of one input together; coefficient times value is exact in float64.
        dtypes: The inputs' dtypes.
        out_dtype: The result's dtype.
    """

    def __init__(self, terms: Sequence[tuple[int, float]], dtypes: Sequence[str], out_dtype: str) -> None:
        self._count = len(terms)
        self._inputs = (ctypes.c_int * len(terms))(*(index for index, _ in terms))
        self._coefficients = (ctypes.c_double * len(terms))(*(coefficient for _, coefficient in terms))
        self._dtypes = (ctypes.c_int * len(dtypes))(*map(DTYPES.index, dtypes))
        self._out_dtype = DTYPES.index(out_dtype)

    def __call__(self, raws: Sequence[Raw], out: Raw, uncertain: Words, *, exact: bool) -> tuple[int, Words]:
        """Write the sums into `out`.

        Args:
            raws: The inputs' elements.
            out: Where the result goes.
            uncertain: Room for as many indices as there are elements.
            exact: Whether plain addition in float64 is known to be exact.

        Returns:
            The number of overflows, which were clamped, and the indices of elements that float64 twice over is too
            short for: the caller does them again.
        """
        functions = library()
        assert functions is not None  # noqa: S101 - whoever made this object has asked
        found = ctypes.c_size_t()
        pointers = (ctypes.c_void_p * len(raws))(*map(_pointer, raws))
        overflow: int = functions.sdops_sum(
            pointers,
            self._dtypes,
            self._coefficients,
            self._inputs,
            self._count,
            ctypes.c_size_t(len(out)),
            _pointer(out),
            self._out_dtype,
            int(exact),
            _pointer(uncertain),
            ctypes.byref(found),
        )
        return overflow, uncertain[: found.value]


class NativeChain:
    """Plays a sum of sums (core/chain.py). Only made where there is a library.

    Args:
        steps: Register to write, input to load or -1, dtype, first term and number of terms.
        terms: Coefficient, register, and what power of 1/2 the coefficient is a multiple of.

    Attributes:
        size: Bytes of an element of the result.
    """

    def __init__(self, steps: Sequence[tuple[int, ...]], terms: Sequence[tuple[float, int, int]]) -> None:
        words = [word for step in steps for word in step]
        self._steps = (ctypes.c_int32 * len(words))(*words)
        self._length = len(steps)
        self.size = 4 if DTYPES[steps[-1][2]] == "F32" else 2
        self._terms = (_ChainTerm * len(terms))(*(_ChainTerm(*term) for term in terms))

    def __call__(
        self,
        inputs: Sequence[ChainInput],
        rooms: Sequence[memoryview],
        portion: int,
        elements: range,
        out: memoryview,
        file: tuple[int, int] = (-1, 0),
    ) -> bool:
        """Make elements of the last step's sums.

        Args:
            inputs: Elements, or where they come from.
            rooms: Where elements are read to, or made.
            portion: How many at once; portions begin at multiples of it.
            elements: Which ones of the tensor.
            out: Where they go: room for all, or for a portion at least if they go to a file.
            file: That file, and the position in it of the first element.

        Returns:
            Whether it is done; else it has to be made sum by sum, see chain.c and chain_files.c.
        """
        functions = library()
        assert functions is not None  # noqa: S101 - whoever made this object has asked
        sources = [_chain_source(each) for each in inputs]  # which keep what the copies in the array point to
        done = functions.sdops_chain_files(
            self._steps,
            self._length,
            self._terms,
            (_ChainSource * len(sources))(*sources),
            len(sources),
            (ctypes.c_void_p * len(rooms))(*map(_address, rooms)),
            ctypes.c_size_t(elements.start),
            ctypes.c_size_t(portion),
            ctypes.c_size_t(len(elements)),
            ctypes.byref(_ChainTarget(_address(out), out.nbytes, file[1], file[0], self.size)),
        )
        return bool(done)


def _chain_source(given: ChainInput) -> _ChainSource:
    if isinstance(given, InFile):
        return _ChainSource(None, None, given.position, 0, 0, given.file, given.size)
    if isinstance(given, InProduct):
        terms = _product_terms(given.terms)
        return _ChainSource(None, ctypes.addressof(terms), given.first, given.columns, len(terms), -1, 4, keep=terms)
    return _ChainSource(_address(given.data), None, 0, 0, 0, -1, given.itemsize)


class _ChainSource(ctypes.Structure):
    _fields_ = (
        ("raw", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("position", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("file", ctypes.c_int32),
        ("size", ctypes.c_int32),
    )


class _ChainTarget(ctypes.Structure):
    _fields_ = (
        ("room", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("file", ctypes.c_int32),
        ("size", ctypes.c_int32),
    )


class _ProductTerm(ctypes.Structure):
    _fields_ = (
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )


def _product_terms(terms: Sequence[Term]) -> ctypes.Array[_ProductTerm]:
    """They do not keep the terms' arrays alive."""
    return (_ProductTerm * len(terms))(
        *[_ProductTerm(_pointer(up), _pointer(down), first, *up.shape) for first, up, down in terms]
    )


def product(terms: Sequence[Term], columns: int, first: int, out: Singles) -> bool:
    """Make elements of a sum of products (core/product.py); False if there is no compiled code for that."""
    functions = library()
    if functions is None:
        return False
    sizes = ctypes.c_size_t(columns), ctypes.c_size_t(first), ctypes.c_size_t(len(out))
    functions.sdops_product(_product_terms(terms), len(terms), *sizes, _pointer(out))
    return True


class _ChainTerm(ctypes.Structure):
    _fields_ = (("coefficient", ctypes.c_double), ("register", ctypes.c_int32), ("bits", ctypes.c_int32))


class NativeTape:
    """Plays a program of core/tape.py on inputs of given dtypes. Only made where there is a library.

    Args:
        program: What is done to each element.
        dtypes: The inputs' dtypes.
        out_dtype: The result's dtype.
    """

    def __init__(self, program: Program, dtypes: Sequence[str], out_dtype: str) -> None:
        words = [word for instruction in program.code for word in instruction]
        constants, count = program.constants, len(program.constants)
        self._program = (
            (ctypes.c_int32 * len(words))(*words),
            len(program.code),
            (ctypes.c_float * count)(*constants),
            count,
            program.result,
        )
        self._dtypes = (ctypes.c_int * len(dtypes))(*map(DTYPES.index, dtypes))
        self._out_dtype = DTYPES.index(out_dtype)

    def __call__(self, raws: Sequence[Raw], out: Raw, keys: Sequence[tuple[int, int]], first: int) -> int:
        """Write the results, rounded to nearest, into `out`.

        Args:
            raws: The inputs' elements.
            out: Where the results go.
            keys: The two words that begin each draw of random numbers.
            first: Flat index of the first element in its tensor.

        Returns:
            The number of overflows, which were clamped; -1 if an input or a result is not finite.
        """
        functions = library()
        assert functions is not None  # noqa: S101 - whoever made this object has asked
        words = [word for pair in keys for word in pair]
        overflow: int = functions.sdops_tape(
            *self._program,
            (ctypes.c_void_p * len(raws))(*map(_pointer, raws)),
            self._dtypes,
            (ctypes.c_uint32 * len(words))(*words),
            ctypes.c_uint64(first),
            ctypes.c_size_t(len(out)),
            _pointer(out),
            self._out_dtype,
        )
        return overflow


def inner(raws: Sequence[Raw], dtypes: Sequence[str], gram: NDArray[np.float64]) -> bool:
    """Add <x_i, x_j> to gram (N, N) on and below the diagonal; False if there is no compiled code for that."""
    functions = library()
    if functions is None or not set(dtypes) <= set(DTYPES) or len(raws) > MOST_INPUTS:
        return False
    functions.sdops_inner(
        (ctypes.c_void_p * len(raws))(*map(_pointer, raws)),
        (ctypes.c_int * len(raws))(*map(DTYPES.index, dtypes)),
        len(raws),
        ctypes.c_size_t(len(raws[0])),
        _pointer(gram),
    )
    return True


def philox(key: tuple[int, int], first: int, words: Words) -> bool:
    """Fill words (n, 4) with Philox4x32-10 of the counters first, first + 1 ...; False if there is no compiled code."""
    functions = library()
    if functions is None:
        return False
    arguments = ctypes.c_uint32(key[0]), ctypes.c_uint32(key[1]), ctypes.c_uint64(first), ctypes.c_size_t(len(words))
    functions.sdops_philox(*arguments, _pointer(words))
    return True


def normal(key: tuple[int, int], first: int, numbers: NDArray[np.float32]) -> bool:
    """Fill numbers (n, 4) with the normal ones of the counters first, first + 1 ...; False without compiled code."""
    functions = library()
    if functions is None:
        return False
    arguments = ctypes.c_uint32(key[0]), ctypes.c_uint32(key[1]), ctypes.c_uint64(first), ctypes.c_size_t(len(numbers))
    functions.sdops_normal(*arguments, _pointer(numbers))
    return True


def make_sum(terms: Sequence[tuple[int, float]], dtypes: Sequence[str], out_dtype: str) -> NativeSum | None:
    """The compiled sum, or None where there is none for these dtypes."""
    if library() is None or not {out_dtype, *dtypes} <= set(DTYPES):
        return None
    return NativeSum(terms, dtypes, out_dtype)


_NOTHING = ctypes.c_char * 0  # at the beginning of any buffer, an empty one, too


def _address(writable: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(_NOTHING.from_buffer(writable)))


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    # not `__array_interface__`: its keys use up Python's table of names, until that is made anew, twice as large
    return _address(array.data) if array.flags.writeable else ctypes.c_void_p(array.ctypes.data)
