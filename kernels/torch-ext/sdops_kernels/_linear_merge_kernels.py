"""Kernels of `linear_merge`: sum_i c_i x_i of many tensors in one launch.

`merge_chunks` adds in float32 with error-free transformations. What that cannot decide (some elements in a million) it
marks, chunk by chunk; `settle_chunks` does the marked chunks again in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rounding import (
    BF16,
    F16,
    F32,
    chunk_of,
    find,
    following,
    load_floats,
    share_of,
    size_of,
    store_floats,
    to_odd,
    to_odd_double,
    to_odd_single,
    two_sum,
)


@triton.jit
def merge_chunks(
    table,  # int64 [problems, 2 + N]: numel, address of the result, of each input
    coefficients,  # float32 [problems, N, 2]: each as high + low
    first,  # int32 [problems + 1]: chunk with which each problem begins
    marks,  # int32 [chunks]: becomes 1 where an element is left to `settle_chunks`, else 0
    problems,
    chunks,
    share,  # chunks per program
    N: tl.constexpr,
    DTYPES: tl.constexpr,  # of input i: digit i in base 5
    OUT: tl.constexpr,
    LOW: tl.constexpr,  # whether a coefficient has a low part
    EXACT: tl.constexpr,
    ALIGNED: tl.constexpr,  # 16-byte accesses: addresses divisible by 16 bytes, sizes by 16 elements
    BLOCK: tl.constexpr,
):
    begin, end, problem = share_of(first, problems, chunks, share)
    lane = tl.arange(0, BLOCK)
    for chunk in range(begin, end):
        problem = following(first, problem, chunk)
        row = table + problem * (N + 2)
        start, mask = chunk_of(first, problem, chunk, tl.load(row), lane, ALIGNED, BLOCK)
        high = tl.zeros((BLOCK,), tl.float32)
        low = tl.zeros((BLOCK,), tl.float32)
        lost = tl.zeros((BLOCK,), tl.float32)
        tiny = lane < 0
        for i in tl.static_range(N):
            x = _input(row, i, start, lane, mask, (DTYPES // 5**i) % 5, ALIGNED)
            c = tl.load(coefficients + (problem * N + i) * 2)
            if EXACT:
                tiny |= (tl.abs(x) < 8.673617379884035e-19) & (x != 0.0)  # 2^-60: errors of products could underflow
                term = x * c
                error = tl.fma(x, c, -term)
                if i == 0:
                    high = term
                    low = error
                else:
                    low, rest = two_sum(low, error)
                    lost += tl.abs(rest)
                    high, error = two_sum(high, term)
                    low, rest = two_sum(low, error)
                    lost += tl.abs(rest)
                if LOW:
                    d = tl.load(coefficients + (problem * N + i) * 2 + 1)
                    term = x * d
                    lost += tl.abs(tl.fma(x, d, -term))
                    low, rest = two_sum(low, term)
                    lost += tl.abs(rest)
            elif i == 0:
                high = x * c
            else:
                high = tl.fma(x, c, high)
        if EXACT:
            total, rest = two_sum(high, low)
            high = tl.where(low == 0.0, high, total)  # keeps the sign of zero
            low = rest
            open_ = _undecided(high, low, lost, tiny, OUT)
            tl.store(marks + chunk, tl.max((mask & open_).to(tl.int32), 0))
            if OUT != F32:
                high = to_odd(high, low)
        store_floats(tl.load(row + 1) + start * size_of(OUT), lane, high, mask, OUT, ALIGNED)


@triton.jit
def _undecided(high, low, lost, tiny, OUT: tl.constexpr):
    """Which sums may round wrongly: high + low is off by up to `lost`, or out of float32's comfortable range."""
    if OUT == F32:
        # the float32 next to high + low must be high, whatever lies within `lost`
        room = tl.abs(low) * 2.384185791015625e-07 + lost * 4.0  # 2^-22
        doubt = (lost > 0.0) & ((high + (low + room) != high) | (high + (low - room) != high))
        limit = 1.329227995784916e36  # 2^120
    else:
        doubt = (lost > 0.0) & (tl.abs(low) <= lost * 4.0)  # else the sign of low is known, and that decides
        limit = 65504.0 if OUT == F16 else 1.329227995784916e36
    return doubt | tiny | ((tl.abs(high) < limit) == 0)


@triton.jit
def _input(row, i: tl.constexpr, start, lane, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """A chunk of the i-th input."""
    return load_floats(tl.load(row + 2 + i) + start * size_of(CODE), lane, mask, CODE, ALIGNED)


@triton.jit
def _beyond(value, OUT: tl.constexpr):
    """Which float64 numbers round to infinity."""
    if OUT == F16:
        edge = 65520.0
    elif OUT == BF16:
        edge = 3.3961775292304601e38
    else:
        edge = 3.4028235677973366e38
    return tl.abs(value) >= edge


@triton.jit
def settle_chunks(
    table,
    coefficients,
    first,
    marked,  # int32 [programs]: the chunks to do again
    found,  # int32 [programs, 3], zeros: elements left open, inputs that are no numbers, results that were clamped
    problems,
    N: tl.constexpr,
    DTYPES: tl.constexpr,
    OUT: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = tl.load(marked + program)
    problem = find(first, problems, chunk)
    row = table + problem * (N + 2)
    lane = tl.arange(0, BLOCK)
    start, mask = chunk_of(first, problem, chunk, tl.load(row), lane, False, BLOCK)
    high = tl.zeros((BLOCK,), tl.float64)
    low = tl.zeros((BLOCK,), tl.float64)
    lost = tl.zeros((BLOCK,), tl.float64)
    foreign = lane < 0
    for i in tl.static_range(N):
        x = _input(row, i, start, lane, mask, (DTYPES // 5**i) % 5, False)
        foreign |= (tl.abs(x) <= 3.4028234663852886e38) == 0
        x = x.to(tl.float64)
        c = tl.load(coefficients + (problem * N + i) * 2).to(tl.float64)
        d = tl.load(coefficients + (problem * N + i) * 2 + 1).to(tl.float64)
        if i == 0:
            high = x * c  # 24 + 24 bits: exact
        else:
            high, error = two_sum(high, x * c)
            low, rest = two_sum(low, error)
            lost += tl.abs(rest)
        if LOW:
            total, error = two_sum(high, x * d)
            high = tl.where(d == 0.0, high, total)  # + 0 would change the sign of zero
            low, rest = two_sum(low, tl.where(d == 0.0, 0.0, error))
            lost += tl.abs(rest)
    exact = (low == 0.0) & (lost == 0.0)
    total, low = two_sum(high, low)
    total = tl.where(exact, high, total)  # keeps the sign of zero
    open_ = (lost > 0.0) & (tl.abs(low) <= lost * 4.0) & (foreign == 0)
    odd = to_odd_double(total, low)
    if OUT == F32:
        value = odd.to(tl.float32)
        largest = 3.4028234663852886e38
    else:
        value = to_odd_single(odd)
        largest = 65504.0 if OUT == F16 else 3.3895313892515355e38
    clamped = _beyond(odd, OUT) & (foreign == 0)
    value = tl.where(clamped, tl.where(odd > 0.0, largest, -largest), value)
    tl.store(found + program * 3, tl.sum((open_ & mask).to(tl.int32), 0))
    tl.store(found + program * 3 + 1, tl.sum((foreign & mask).to(tl.int32), 0))
    tl.store(found + program * 3 + 2, tl.sum((clamped & mask).to(tl.int32), 0))
    store_floats(tl.load(row + 1) + start * size_of(OUT), lane, value, mask, OUT, False)
