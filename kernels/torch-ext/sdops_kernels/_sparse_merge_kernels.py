"""Kernels of `sparse_merge`: sums of changes of which each model keeps some, drawn at random or the largest.

TIES takes three passes for the border of what is kept (histograms of 11, 10 and 10 bits of the magnitudes), one for the
places of those that are equal to it, and one for the merge. All counts are integers, so the order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rounding import chunk_of, following, interleaved, load_floats, random_words, share_of, size_of, store_floats


@triton.jit
def _delta(row, i, base, start, lane, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """A chunk of x_i - base."""
    return load_floats(tl.load(row + 3 + i) + start * size_of(CODE), lane, mask, CODE, ALIGNED) - base


@triton.jit
def _magnitude(change):
    """The bits of |change|, which are ordered as the magnitudes are."""
    return change.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def count_magnitudes(
    table,  # int64 [problems, 3 + N]: numel, address of the result, of the base, of each model
    first,  # int32 [problems + 1]: chunk with which each problem begins
    prefix,  # int32 [problems, N]: the bits above those that are counted
    counts,  # int32 [problems, N, BINS]
    problems,
    chunks,
    share,
    shift,
    N: tl.constexpr,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS: tl.constexpr,
    WHOLE: tl.constexpr,  # the first level: there is no prefix
    BLOCK: tl.constexpr,
):
    begin, end, problem = share_of(first, problems, chunks, share)
    model = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    found = tl.zeros((BINS,), tl.int32)
    for chunk in range(begin, end):
        row = table + problem * (N + 3)
        start, mask = chunk_of(first, problem, chunk, tl.load(row), lane, ALIGNED, BLOCK)
        base = load_floats(tl.load(row + 2) + start * size_of(CODE), lane, mask, CODE, ALIGNED)
        bits = _magnitude(_delta(row, model, base, start, lane, mask, CODE, ALIGNED))
        counted = mask
        if WHOLE == 0:
            counted = mask & ((bits >> shift) // BINS == tl.load(prefix + problem * N + model))
        place = (bits >> shift) & (BINS - 1)
        found += tl.histogram(place, BINS, mask=counted)
        coming = following(first, problem, chunk + 1)
        if (coming != problem) | (chunk + 1 == end):
            tl.atomic_add(counts + (problem * N + model).to(tl.int64) * BINS + bins, found, mask=found > 0)
            found = tl.zeros((BINS,), tl.int32)
        problem = coming


@triton.jit
def count_ties(
    table,
    first,
    border,  # int32 [problems, N]
    ties,  # int32 [chunks, N]: receives how many are equal to the border
    problems,
    chunks,
    share,
    N: tl.constexpr,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end, problem = share_of(first, problems, chunks, share)
    lane = tl.arange(0, BLOCK)
    for chunk in range(begin, end):
        problem = following(first, problem, chunk)
        row = table + problem * (N + 3)
        start, mask = chunk_of(first, problem, chunk, tl.load(row), lane, ALIGNED, BLOCK)
        base = load_floats(tl.load(row + 2) + start * size_of(CODE), lane, mask, CODE, ALIGNED)
        for i in tl.static_range(N):
            bits = _magnitude(_delta(row, i, base, start, lane, mask, CODE, ALIGNED))
            equal = mask & (bits == tl.load(border + problem * N + i))
            tl.store(ties + chunk * N + i, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def merge_sparse(
    table,
    numbers,  # float32 [problems, 3 + N]: density, factor, divisor without election, weights
    keys,  # int64 [problems, N, 2]: DARE: keys of the random words
    border,  # int32 [problems, N, 2]: TIES: what is larger is kept, and so many of those that are equal
    before,  # int32 [chunks, N]: how many of those lie in earlier chunks
    first,
    marks,  # int32 [chunks]: becomes 1 where something is no number
    problems,
    chunks,
    share,
    N: tl.constexpr,
    CODE: tl.constexpr,
    OUT: tl.constexpr,
    RANDOM: tl.constexpr,  # DARE, else TIES
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TURNS: tl.constexpr = 2 if ELECT else 1  # the sum's signs are known after the first
    begin, end, problem = share_of(first, problems, chunks, share)
    lane = tl.arange(0, BLOCK)
    for chunk in range(begin, end):
        problem = following(first, problem, chunk)
        row = table + problem * (N + 3)
        own = numbers + problem * (N + 3)
        start, mask = chunk_of(first, problem, chunk, tl.load(row), lane, ALIGNED, BLOCK)
        base = load_floats(tl.load(row + 2) + start * size_of(CODE), lane, mask, CODE, ALIGNED)
        total = tl.zeros((BLOCK,), tl.float32)
        direction = tl.full((BLOCK,), 1.0, tl.float32)
        for turn in tl.static_range(TURNS):
            divisor = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(N):
                change = _delta(row, i, base, start, lane, mask, CODE, ALIGNED)
                entry = problem * N + i
                if RANDOM:
                    change = _drawn(change, keys + entry * 2, tl.load(own), start, BLOCK)
                else:
                    change = _largest(change, mask, border + entry * 2, tl.load(before + chunk * N + i))
                weight = tl.load(own + 3 + i)
                term = change * weight
                part = tl.zeros((BLOCK,), tl.float32)
                if turn == 1:
                    agrees = term * direction > 0.0
                    term = tl.where(agrees, term * direction, 0.0)
                    part = tl.where(agrees, 1.0, 0.0) * weight
                if i == 0:
                    total = term
                    divisor = part
                else:
                    total += term
                    divisor += part
            if turn + 1 < TURNS:
                direction = tl.where(total.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)
        if ELECT:
            total = total * direction
            if NORMALIZE:
                total = tl.div_rn(total, divisor + tl.where(divisor == 0.0, 1.0, 0.0))
        elif NORMALIZE:
            total = tl.div_rn(total, tl.zeros((BLOCK,), tl.float32) + tl.load(own + 2))
        result = base + tl.load(own + 1) * total
        foreign = mask & ((tl.abs(result) <= 3.4028234663852886e38) == 0)
        tl.store(marks + chunk, tl.max(foreign.to(tl.int32), 0))
        store_floats(tl.load(row + 1) + start * size_of(OUT), lane, result, mask, OUT, ALIGNED)


@triton.jit
def _drawn(change, key, density, start, BLOCK: tl.constexpr):
    """DARE: what is drawn of a chunk, divided by the density; 0 elsewhere."""
    group = start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = random_words(tl.load(key), tl.load(key + 1), group)
    words = interleaved(w0, w1, w2, w3, BLOCK)
    keep = (words >> 8).to(tl.float32) * 5.960464477539063e-08 < density  # 2^-24
    divisor = tl.zeros((BLOCK,), tl.float32) + tl.where(density == 0.0, 1.0, density)
    return tl.div_rn(tl.where(keep, change, 0.0), divisor)


@triton.jit
def _largest(change, mask, border, before):
    """TIES: what of a chunk is beyond the border, and so many equal to it as there is room for; 0 elsewhere."""
    bits = _magnitude(change)
    edge = tl.load(border)
    equal = mask & (bits == edge)
    count = equal.to(tl.int32)
    place = before + tl.cumsum(count, 0) - count
    keep = (bits > edge) | (equal & (place < tl.load(border + 1)))
    return tl.where(keep, change, 0.0)
