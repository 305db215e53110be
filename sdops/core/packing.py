"""Bit patterns of half-precision numbers from and to wider floats, with integer shifts on whole arrays.

numpy converts halves one element at a time; shifting is twenty times faster. Scaling by a power of two makes the wide
format's exponent field equal that of the half, so subnormal numbers need no special case:

    fp16 << 13   is a float32 of x * 2**-112        x * 2**-1008 as float64 has the exponent field of fp16
    bf16 << 16   is a float32 of x                  x * 2**-896  as float64 has the exponent field of bf16
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from sdops.core.precision import FORMATS, Doubles, Raw

PIECE = 1 << 18  # elements worked on at once: a few float64 buffers of this size live in L3, call overhead vanishes

WIDENED_SCALE = {"F16": -112, "BF16": 0, "F32": 0, "F64": 0}
PACKED_SCALE = {"F16": -1008, "BF16": -896, "F32": 0, "F64": 0}

Indices = NDArray[np.intp]
NOTHING: Indices = np.empty(0, np.intp)


class Scratch:
    """One thread's buffers, reused for every piece."""

    _local = threading.local()

    def __init__(self) -> None:
        self.words = np.empty(PIECE, np.int32)
        self.flags = np.empty(PIECE, np.int32)
        self.shorts = np.empty(PIECE, np.uint16)
        self.total = np.empty(PIECE, np.float64)
        self.term = np.empty(PIECE, np.float64)

    @classmethod
    def of_thread(cls) -> Scratch:
        """The calling thread's buffers, made at its first call."""
        if not hasattr(cls._local, "scratch"):
            cls._local.scratch = cls()
        scratch: Scratch = cls._local.scratch
        return scratch


def widen(raw: Raw, dtype: str, words: NDArray[np.int32]) -> NDArray[np.float32]:
    """Halves as float32 times 2**WIDENED_SCALE[dtype], exactly, in the memory of `words`."""
    np.copyto(words, raw.view(np.int16))  # sign-extends
    if dtype == "F16":
        np.left_shift(words, 13, out=words)
        np.bitwise_and(words, np.int32(-0x70000001), out=words)  # sign, 5 exponent bits, mantissa
    else:
        np.left_shift(words, 16, out=words)
    return words.view(np.float32)


def widen_to_double(raw: Raw, dtype: str, out: Doubles, scratch: Scratch) -> None:
    """Values times 2**WIDENED_SCALE[dtype], exactly, into `out`."""
    if dtype in ("F32", "F64"):
        np.copyto(out, raw.view(np.float32 if dtype == "F32" else np.float64))
    else:
        np.copyto(out, widen(raw, dtype, scratch.words[: len(raw)]))


def pack_singles(words: NDArray[np.int32], out: Raw, scratch: Scratch) -> None:
    """fp16 of float32 numbers scaled by 2**-112, rounded to nearest, ties to even. `words` is used up."""
    odd = scratch.flags[: len(words)]
    np.right_shift(words, 13, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0xFFF, out=odd)
    np.add(words, odd, out=words)
    _narrow(words, 13, out, scratch)


def pack_doubles(total: Doubles, dtype: str, out: Raw, scratch: Scratch, *, keep_words: bool) -> None:
    """Halves of float64 numbers scaled by 2**PACKED_SCALE[dtype], rounded to nearest, ties away from zero.

    The high word of a scaled number holds sign, exponent and 20 mantissa bits; adding half a unit rounds. The words
    after this addition tell where more care is needed; `keep_words` leaves them in `scratch.words`.
    """
    words, copy = scratch.words[: len(total)], scratch.flags[: len(total)]
    shift = 20 - FORMATS[dtype].mantissa
    np.copyto(words, total.view(np.int32)[1::2])
    np.add(words, 1 << (shift - 1), out=words)
    if keep_words:
        np.copyto(copy, words)
    _narrow(copy if keep_words else words, shift, out, scratch)


def settle_ties(total: Doubles, dtype: str, out: Raw, scratch: Scratch) -> None:
    """After `pack_doubles` of exact numbers: what lay exactly between two halves goes to the even one."""
    words, low = scratch.words[: len(total)], scratch.flags[: len(total)]
    np.bitwise_and(words, (1 << (20 - FORMATS[dtype].mantissa)) - 1, out=low)
    at_high_word = np.flatnonzero(low == 0)  # the high word was a tie; was the low word zero as well?
    ties = at_high_word[total.view(np.int32)[0::2][at_high_word] == 0]
    out[ties] &= np.uint16(0xFFFE)  # rounded away: an odd result is one too far from zero


def near_ties(total: Doubles, dtype: str, error: float, scratch: Scratch) -> Indices:
    """After `pack_doubles`: where an error of at most `error` (unscaled) in the sum could change the result."""
    words, low = scratch.words[: len(total)], scratch.flags[: len(total)]
    shift = 20 - FORMATS[dtype].mantissa
    mask = (1 << shift) - 1
    # within one unit of the high word of a tie: its low bits were 100..0 or 011..1, which the addition made 0 or mask
    np.add(words, 1, out=low)
    np.bitwise_and(low, mask, out=low)
    suspect = low <= 1
    # where that unit is smaller than the error
    floor = np.array([error * 2.0**21 * 2.0 ** PACKED_SCALE[dtype]]).view(np.int32)[1]
    if floor > (1 << 20 if dtype == "F16" else 0):
        np.bitwise_and(words, 0x7FFFFFFF, out=low)
        suspect |= low <= floor + (1 << shift)
    return np.flatnonzero(suspect)


def near_single_ties(total: Doubles, error: float) -> Indices:
    """Where an error of at most `error` could change the float32 nearest to a float64 sum."""
    window = 1 << 20  # in units of float64's last place: numbers above 2**33 errors are safe outside
    low = total.view(np.uint64) & np.uint64((1 << 29) - 1)
    low -= np.uint64((1 << 28) - window)  # wraps below
    suspect = low <= np.uint64(2 * window)
    suspect |= np.abs(total) <= error * 2.0**33
    return np.flatnonzero(suspect)


def _narrow(words: NDArray[np.int32], shift: int, out: Raw, scratch: Scratch) -> None:
    """The 15 bits above `shift` and the sign. `words` is used up."""
    shorts = scratch.shorts[: len(words)]
    np.right_shift(words, shift, out=words)
    np.copyto(out, words, casting="unsafe")
    np.right_shift(words, 16 - shift, out=words)
    np.copyto(shorts, words, casting="unsafe")
    np.bitwise_and(shorts, 0x8000, out=shorts)
    np.bitwise_or(out, shorts, out=out)
