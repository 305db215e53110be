"""Kernels of `lora_linear`: the product with a frozen matrix and a LoRA in one pass over x, and the LoRA's gradients.

Forward and backward are the same product: y = x W^T + (s x A^T) B^T, and dx = dy W + (s dy B) A with all matrices the
other way round (TURNED). The gradients dB = dy^T S and dA = (s dy B)^T x are sums over the tokens; slabs of tokens are
added up in a fixed order, without atomics, so that they are the same every time.

Rows that begin at multiples of 16 bytes are read 16 bytes at a time: the launcher compiles a variant for sizes that
are divisible by 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x,  # [M, K]
    weight,  # [N, K]; TURNED [K, N]
    bias,  # [N]
    first,  # [rank, K]; TURNED [K, rank]
    second,  # [N, rank]; TURNED [rank, N]
    result,  # [M, N]
    inner,  # [M, rank]: receives scale x first^T
    tokens,
    outputs,
    inputs,
    rank,
    scale,
    BIAS: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,  # the rank, filled up to a power of two of at least 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    r = tl.arange(0, R)
    of_rank = r < rank
    total = tl.zeros((BM, BN), tl.float32)
    low = tl.zeros((BM, R), tl.float32)
    for begin in range(0, inputs, BK):
        rest = k < inputs - begin
        rows = _read(x, m[:, None] * inputs + (begin + k)[None, :], (m < tokens)[:, None] & rest[None, :], WIDE)
        if TURNED:
            place = (begin + k)[:, None] * outputs + n[None, :]
            place_of_factor = (begin + k)[:, None] * rank + r[None, :]
        else:
            place = n[None, :] * inputs + (begin + k)[:, None]
            place_of_factor = r[None, :] * inputs + (begin + k)[:, None]
        columns = _read(weight, place, (n < outputs)[None, :] & rest[:, None], WIDE)
        factors = _read(first, place_of_factor, of_rank[None, :] & rest[:, None], WIDE)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        low = tl.dot(rows, factors, low, input_precision="ieee")
    low = low * scale
    if tl.program_id(1) == 0:
        _write(inner, m[:, None] * rank + r[None, :], low, (m < tokens)[:, None] & of_rank[None, :], WIDE)
    place_of_factor = r[:, None] * outputs + n[None, :] if TURNED else n[None, :] * rank + r[:, None]
    last = _read(second, place_of_factor, (n < outputs)[None, :] & of_rank[:, None], WIDE)
    if WIDE:
        total = tl.dot(_rounded(low, inner), last, total, input_precision="ieee")
    else:
        total = tl.dot(low.to(last.dtype), last, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    _write(result, m[:, None] * outputs + n[None, :], total, (m < tokens)[:, None] & (n < outputs)[None, :], WIDE)


@triton.jit
def add_gradients(
    gradient,  # [M, N]: dy
    x,  # [M, K]
    inner,  # [M, rank]: S = s x A^T
    low,  # [M, rank]: s dy B
    partial,  # float32 [slabs, N + K, rank]: receives dy^T S, and below it x^T (s dy B), of each slab of tokens
    tokens,
    outputs,
    inputs,
    rank,
    across,  # tiles of N
    slab,  # tokens of a slab
    WIDE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    begin = tl.program_id(1) * slab
    end = tl.minimum(begin + slab, tokens)
    out = partial + tl.program_id(1).to(tl.int64) * ((outputs + inputs) * rank)
    if tile < across:
        _add_tile(gradient, inner, out, tile * BN, outputs, begin, end, rank, WIDE, R, BM, BN)
    else:
        _add_tile(x, low, out + outputs * rank, (tile - across) * BN, inputs, begin, end, rank, WIDE, R, BM, BN)


@triton.jit
def _add_tile(
    wide,  # [M, width]
    narrow,  # [M, rank]
    out,  # [width, rank]
    left,
    width,
    begin,
    end,
    rank,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """wide^T narrow over some tokens, for BN columns of `wide`."""
    n = left + tl.arange(0, BN)
    r = tl.arange(0, R)
    total = tl.zeros((BN, R), tl.float32)
    for start in range(begin, end, BM):
        m = start + tl.arange(0, BM)
        columns = _read(wide, m[None, :] * width + n[:, None], (m < end)[None, :] & (n < width)[:, None], WIDE)
        rows = _read(narrow, m[:, None] * rank + r[None, :], (m < end)[:, None] & (r < rank)[None, :], WIDE)
        total = tl.dot(columns, rows, total, input_precision="ieee")
    tl.store(out + n[:, None] * rank + r[None, :], total, mask=(n < width)[:, None] & (r < rank)[None, :])


@triton.jit
def _read(pointer, offsets, mask, WIDE: tl.constexpr):
    """An operand of a product; in the interpreter as float32, since that multiplies the bits of bfloat16."""
    values = tl.load(pointer + offsets, mask=mask, other=0.0)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def _rounded(values, pointer):
    """float32 rounded to a pointer's dtype and back; the interpreter truncates to bfloat16."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        values = values.to(pointer.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def _write(pointer, offsets, values, mask, WIDE: tl.constexpr):
    """Rounded once; what is truncated in the interpreter was rounded before."""
    if WIDE:
        values = _rounded(values, pointer)
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)
