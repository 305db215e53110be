"""Kernels of `bake`: W' = round(W + sum of changes) of many matrices in one launch; every weight is moved once.

A problem is a matrix, a segment one change of some of its rows. Rows of the tables (int64):

    problem   weight, result, their leading strides, rows, columns, first and one past the last segment,
              place of its scales (fp8) and their step (0 = one number, 1 = one per row)
    segment   kind, a, b, a', b', rank, leading strides of a and b, first row, rows, gain and its axis,
              rows and columns of w2
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rounding import (
    as_floats,
    following,
    load_floats,
    load_operand,
    load_raw,
    random_words,
    rounded_at_random,
    rounded_once,
    share_of,
    size_of,
    store_floats,
    two_sum,
)

PROBLEM = tl.constexpr(10)
SEGMENT = tl.constexpr(14)

LORA = tl.constexpr(0)  # a b
LOHA = tl.constexpr(1)  # (a b) * (a' b')
LOKR = tl.constexpr(2)  # a (x) b
DENSE = tl.constexpr(3)  # a


@triton.jit
def bake_tiles(
    problems,  # int64 [P, PROBLEM]
    segments,  # int64 [S, SEGMENT]
    numbers,  # float32 [S, 2]: scale of the change, strength
    keys,  # int64 [P, 2]: the key of each tensor's random words
    scales,  # float32: those of fp8 weights
    fresh,  # float32: those of the results, at the same places
    most,  # int32: receives the bits of the largest magnitudes there
    first,  # int32 [P + 1]: tile with which each problem begins
    count,
    tiles,
    share,  # tiles per program
    BASE: tl.constexpr,
    OUT: tl.constexpr,
    FACTOR: tl.constexpr,
    KINDS: tl.constexpr,  # bit k: there are segments of kind k; bit 4: segments with a gain
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # in the interpreter: products in float32
    PRECISION: tl.constexpr,  # of products of float32 factors: ieee or tf32x3
    RANDOM: tl.constexpr,
    MEASURE: tl.constexpr,  # write no weights, but their largest magnitudes
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    begin, end, problem = share_of(first, count, tiles, share)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    for tile in range(begin, end):
        problem = following(first, problem, tile)
        row = problems + problem * PROBLEM
        rows, columns = shape_of(row, ALIGNED)
        place = tile - tl.load(first + problem)
        across = (columns + BN - 1) // BN
        top = (place // across) * BM
        left = (place % across) * BN
        inside = (m < rows - top)[:, None] & (n < columns - left)[None, :]
        raw = tile_of(row, 0, 2, top, left, m, n, inside, BASE, ALIGNED)  # under way while the change is made
        total = tl.zeros((BM, BN), tl.float32)
        for segment in range(tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)):
            entry = segments + segment * SEGMENT
            start = tl.load(entry + 8).to(tl.int32)
            height = tl.load(entry + 9).to(tl.int32)
            if (start < top + BM) & (start + height > top):
                change = change_of(
                    entry, top - start, height, left, columns, m, n, FACTOR, KINDS, ALIGNED, WIDE, PRECISION, BM, BN, BR
                )
                change = change * tl.load(numbers + segment * 2)
                if KINDS & 16:
                    weight = weight_of(raw, row, scales, top, rows, m, BASE)
                    change = _directed(entry, weight, change, top - start, height, left, columns, m, n)
                total += change * tl.load(numbers + segment * 2 + 1)
        high, low = two_sum(weight_of(raw, row, scales, top, rows, m, BASE), total)
        if OUT > 2:
            step = tl.load(row + 9).to(tl.int32)
            target = tl.load(row + 8) + (top + m) * step
            if MEASURE:
                _measure(most, target, step, tl.where(inside, tl.abs(high), 0.0), m < rows - top)
            else:
                own = tl.load(fresh + target, mask=m < rows - top, other=1.0)[:, None]
                high = tl.div_rn(high, tl.broadcast_to(own, (BM, BN)))
                low = tl.zeros((BM, BN), tl.float32)
        if MEASURE == 0:
            if RANDOM:
                words = _words(keys + problem * 2, top, left, columns, m, n, ALIGNED, BM, BN)
                result = rounded_at_random(high, low, words, OUT)
            else:
                result = rounded_once(high, low, OUT)
            _store_tile(row, 1, 3, top, left, m, n, inside, result, OUT, ALIGNED)


@triton.jit
def shape_of(row, ALIGNED: tl.constexpr):
    """Rows and columns of a problem; ALIGNED promises that columns are divisible by 16."""
    rows = tl.load(row + 4).to(tl.int32)
    columns = tl.load(row + 5).to(tl.int32)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    return rows, columns


@triton.jit
def tile_of(
    row, address: tl.constexpr, stride: tl.constexpr, top, left, m, n, inside, CODE: tl.constexpr, ALIGNED: tl.constexpr
):
    """A tile of a matrix as it is stored."""
    corner, offsets = _place(row, address, stride, top, left, m, n, CODE, ALIGNED)
    return load_raw(corner, offsets, inside, CODE, ALIGNED)


@triton.jit
def _place(
    row, address: tl.constexpr, stride: tl.constexpr, top, left, m, n, CODE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Where a tile lies whose matrix is in a table: a 64-bit address for its corner, 32-bit offsets inside."""
    leading = tl.load(row + stride)
    if ALIGNED:
        leading = tl.multiple_of(leading, 16)
    corner = tl.load(row + address) + (top.to(tl.int64) * leading + left) * size_of(CODE)
    return corner, m[:, None] * leading.to(tl.int32) + n[None, :]


@triton.jit
def weight_of(raw, row, scales, top, rows, m, BASE: tl.constexpr):
    """A tile of the weight as float32, fp8 times its scales."""
    weight = as_floats(raw, BASE)
    if BASE > 2:
        own = scales + tl.load(row + 8) + (top + m) * tl.load(row + 9).to(tl.int32)
        weight = weight * tl.load(own, mask=m < rows - top, other=1.0)[:, None]
    return weight


@triton.jit
def _store_tile(
    row,
    address: tl.constexpr,
    stride: tl.constexpr,
    top,
    left,
    m,
    n,
    inside,
    values,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    corner, offsets = _place(row, address, stride, top, left, m, n, CODE, ALIGNED)
    store_floats(corner, offsets, values, inside, CODE, ALIGNED)


@triton.jit
def change_of(
    entry,
    top,
    height,
    left,
    columns,
    m,
    n,
    FACTOR: tl.constexpr,
    KINDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """A segment's change of a tile; `top` is the tile's first row, counted from the segment's first."""
    kind = tl.load(entry)
    change = tl.zeros((BM, BN), tl.float32)
    if KINDS & 3:
        if kind <= LOHA:
            change = _product(
                entry, 1, 2, top, height, left, columns, m, n, FACTOR, ALIGNED, WIDE, PRECISION, BM, BN, BR
            )
    if KINDS & 2:
        if kind == LOHA:
            change *= _product(
                entry, 3, 4, top, height, left, columns, m, n, FACTOR, ALIGNED, WIDE, PRECISION, BM, BN, BR
            )
    if KINDS & 4:
        if kind == LOKR:
            change = _kron(entry, top, height, left, columns, m, n, FACTOR)
    if KINDS & 8:
        if kind == DENSE:
            rows = top + m
            inside = ((rows >= 0) & (rows < height))[:, None] & (n < columns - left)[None, :]
            corner, offsets = _place(entry, 1, 6, top, left, m, n, FACTOR, ALIGNED)
            change = load_floats(corner, offsets, inside, FACTOR, ALIGNED)
    return change


@triton.jit
def _product(
    entry,
    a: tl.constexpr,
    b: tl.constexpr,
    top,
    height,
    left,
    columns,
    m,
    n,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """A tile of a @ b: [rows, rank] @ [rank, columns]."""
    rank = tl.load(entry + 5).to(tl.int32)
    stride_a = tl.load(entry + 6).to(tl.int32)
    stride_b = tl.load(entry + 7).to(tl.int32)
    if ALIGNED:
        stride_b = tl.multiple_of(stride_b, 16)
    left_a = tl.load(entry + a)
    left_b = tl.load(entry + b) + left.to(tl.int64) * size_of(FACTOR)
    r = tl.arange(0, BR)
    rows = top + m
    valid = (rows >= 0) & (rows < height)
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, rank, BR):
        rest = r < rank - begin
        up = load_operand(
            left_a,
            rows[:, None] * stride_a + (begin + r)[None, :],
            valid[:, None] & rest[None, :],
            FACTOR,
            False,
            WIDE,
        )
        down = load_operand(
            left_b,
            (begin + r)[:, None] * stride_b + n[None, :],
            rest[:, None] & (n < columns - left)[None, :],
            FACTOR,
            ALIGNED,
            WIDE,
        )
        total = tl.dot(up, down, total, input_precision=PRECISION)
    return total


@triton.jit
def _kron(entry, top, height, left, columns, m, n, FACTOR: tl.constexpr):
    """A tile of w1 (x) w2: element (i c + u, j d + v) is w1[i, j] w2[u, v]."""
    stride_1 = tl.load(entry + 6).to(tl.int32)
    stride_2 = tl.load(entry + 7).to(tl.int32)
    c = tl.load(entry + 12).to(tl.int32)
    d = tl.load(entry + 13).to(tl.int32)
    rows = top + m
    valid = (rows >= 0) & (rows < height)
    rows = tl.where(valid, rows, 0)
    across = left + n
    inside = valid[:, None] & (across < columns)[None, :]
    outer = (rows // c)[:, None] * stride_1 + (across // d)[None, :]
    inner = (rows % c)[:, None] * stride_2 + (across % d)[None, :]
    first = load_floats(tl.load(entry + 1), outer, inside, FACTOR, False)
    return first * load_floats(tl.load(entry + 2), inner, inside, FACTOR, False)


@triton.jit
def _directed(entry, weight, change, top, height, left, columns, m, n):
    """DoRA: (W + change) gain - W, with gain = magnitude / norm per row or per column; change where there is none."""
    address = tl.load(entry + 10)
    axis = tl.load(entry + 11)
    rows = top + m
    valid = (rows >= 0) & (rows < height)
    pointer = address.to(tl.pointer_type(tl.float32))
    of_row = valid & (rows < tl.where(axis == 0, height, 0))
    of_column = n < tl.where(axis == 1, columns - left, 0)
    along_rows = tl.load(pointer + rows, mask=of_row, other=1.0)
    along_columns = tl.load(pointer + left + n, mask=of_column, other=1.0)
    gain = along_rows[:, None] * along_columns[None, :]
    turned = (weight + change) * gain - weight
    directed = rows < tl.where(axis < 2, height, 0)
    return tl.where((valid & directed)[:, None], turned, change)


@triton.jit
def _measure(most, target, step, magnitude, valid):
    """Largest magnitudes as integers, which are ordered as they are: the order of the atomics does not matter."""
    along = tl.max(magnitude, 1)
    if step == 0:
        tl.atomic_max(most + tl.min(target, 0), tl.max(along, 0).to(tl.int32, bitcast=True))
    else:
        tl.atomic_max(most + target, along.to(tl.int32, bitcast=True), mask=valid)


@triton.jit
def _words(key, top, left, columns, m, n, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One random word per element of a tile, numbered along the rows of the whole tensor."""
    low = tl.load(key)
    high = tl.load(key + 1)
    if ALIGNED:  # four neighbours of a row share a counter
        fours = tl.arange(0, BN // 4)
        group = ((top + m).to(tl.int64) * (columns // 4))[:, None] + (left // 4 + fours)[None, :]
        w0, w1, w2, w3 = random_words(low, high, group)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BN))
    else:
        place = ((top + m).to(tl.int64) * columns)[:, None] + (left + n)[None, :]
        w0, w1, w2, w3 = random_words(low, high, place // 4)
        lane = place % 4
        words = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return words
