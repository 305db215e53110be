"""The kernel of `dora_gains`: sums of the squares of W + change along rows or columns, of all layers in one launch.

Tables are those of `bake_tiles`; a problem has one segment, and in place of the result's address the place of its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._bake_kernels import PROBLEM, SEGMENT, change_of, shape_of, tile_of, weight_of
from ._rounding import following, share_of


@triton.jit
def add_squares(
    problems,  # int64 [P, PROBLEM]
    segments,  # int64 [P, SEGMENT]
    numbers,  # float32 [P]: scales of the changes
    scales,  # float32: those of fp8 weights
    first,  # int32 [P + 1]: strip with which each problem begins
    sums,  # float32: receives them
    count,
    strips,
    share,  # strips per program
    BASE: tl.constexpr,
    FACTOR: tl.constexpr,
    KINDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    AXIS: tl.constexpr,  # 0: a strip is BM rows, 1: BN columns
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    begin, end, problem = share_of(first, count, strips, share)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    for strip in range(begin, end):
        problem = following(first, problem, strip)
        row = problems + problem * PROBLEM
        entry = segments + problem * SEGMENT
        rows, columns = shape_of(row, ALIGNED)
        place = strip - tl.load(first + problem)
        squares = tl.zeros((BM, BN), tl.float32)
        length = columns if AXIS == 0 else rows
        for step in range(0, length, BN if AXIS == 0 else BM):
            top = place * BM if AXIS == 0 else place * 0 + step
            left = place * 0 + step if AXIS == 0 else place * BN
            inside = (m < rows - top)[:, None] & (n < columns - left)[None, :]
            raw = tile_of(row, 0, 2, top, left, m, n, inside, BASE, ALIGNED)
            change = change_of(
                entry, top, rows, left, columns, m, n, FACTOR, KINDS, ALIGNED, WIDE, PRECISION, BM, BN, BR
            )
            directed = weight_of(raw, row, scales, top, rows, m, BASE) + change * tl.load(numbers + problem)
            squares += directed * directed  # outside both are 0
        if AXIS == 0:
            at = place * BM + m
            tl.store(sums + tl.load(row + 1) + at, tl.sum(squares, 1), mask=at < rows)
        else:
            at = place * BN + n
            tl.store(sums + tl.load(row + 1) + at, tl.sum(squares, 0), mask=at < columns)
