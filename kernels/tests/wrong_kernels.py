"""Kernels with one mistake each, which the checks of `cases.py` must find."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silent_tf32(a, b, out, SIZE: tl.constexpr):
    """float32 products in Triton's default precision."""
    place = tl.arange(0, SIZE)
    tile = place[:, None] * SIZE + place[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def unaligned(addresses, out, SIZE: tl.constexpr):
    """A pointer out of a table, without `tl.multiple_of`."""
    pointer = tl.load(addresses).to(tl.pointer_type(tl.float16))
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(pointer + place))


@triton.jit
def greedy(a, out, SIZE: tl.constexpr):
    """More numbers at once than there are registers."""
    place = tl.arange(0, SIZE)
    tile = place[:, None] * SIZE + place[None, :]
    x = tl.load(a + tile)
    for _ in tl.static_range(2):
        x += tl.sum(x, 0)[None, :] * tl.sum(x, 1)[:, None]
    tl.store(out + tile, x)
