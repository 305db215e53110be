"""The kernel of `inner_products`: <x_i, x_j> of all tensors of N models in one launch, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from ._rounding import find, load_floats, size_of


@triton.jit
def add_products(
    table,  # int64 [problems, 1 + N]: numel, address of each input
    first,  # int32 [problems + 1]: run with which each problem begins
    sums,  # float64 [runs, PAIRS]: receives those of each run
    problems,
    N: tl.constexpr,
    PAIRS: tl.constexpr,  # N (N + 1) / 2: (0, 0), (1, 0), (1, 1), (2, 0) ...
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a run
):
    """One program per run and pair, those of one run side by side: what one has read lies in the cache for the next.

    The order of the sums depends on BLOCK and BLOCKS alone.
    """
    pair = tl.program_id(0) % PAIRS
    run = tl.program_id(0) // PAIRS
    problem = find(first, problems, run)
    i = 0
    for row in tl.static_range(1, N):
        i += (pair >= row * (row + 1) // 2).to(tl.int32)
    j = pair - i * (i + 1) // 2
    entry = table + problem * (N + 1)
    begin = (run - tl.load(first + problem)).to(tl.int64) * (BLOCK * BLOCKS)
    numel = tl.load(entry)
    one, other = tl.load(entry + 1 + i), tl.load(entry + 1 + j)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    blocks = (tl.minimum(numel - begin, BLOCK * BLOCKS).to(tl.int32) + BLOCK - 1) // BLOCK
    for block in range(blocks):
        start = begin + block * BLOCK
        left = tl.minimum(numel - start, BLOCK).to(tl.int32)
        if ALIGNED:
            left = tl.multiple_of(left, 16)
        x = load_floats(one + start * size_of(CODE), lane, lane < left, CODE, ALIGNED)
        y = load_floats(other + start * size_of(CODE), lane, lane < left, CODE, ALIGNED)
        total += x.to(tl.float64) * y.to(tl.float64)
    tl.store(sums + run.to(tl.int64) * PAIRS + pair, tl.sum(total, 0))
