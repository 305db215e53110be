"""The forward pass of a linear layer with a LoRA in one kernel: x is read once for x W^T and for S = s x A^T."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(pointer, offsets, mask, WIDE: tl.constexpr):
    """An operand of a product; in the interpreter as float32, since that multiplies the bits of bfloat16."""
    values = tl.load(pointer + offsets, mask=mask, other=0.0)
    if WIDE:
        values = values.to(tl.float32)
    return values


@triton.jit
def forward(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    down,  # [rank, K]
    up,  # [N, rank]
    result,  # [M, N]
    inner,  # [M, rank]: S
    tokens,
    outputs,
    inputs,
    rank,
    scale,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,  # the rank, filled up to a power of two of at least 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    if ALIGNED:
        inputs = tl.multiple_of(inputs, 16)
        outputs = tl.multiple_of(outputs, 16)
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
        columns = _read(
            weight, n[None, :] * inputs + (begin + k)[:, None], (n < outputs)[None, :] & rest[:, None], WIDE
        )
        factors = _read(down, r[None, :] * inputs + (begin + k)[:, None], of_rank[None, :] & rest[:, None], WIDE)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        low = tl.dot(rows, factors, low, input_precision="ieee")
    low = low * scale
    if tl.program_id(1) == 0:
        _write(inner, m[:, None] * rank + r[None, :], low, (m < tokens)[:, None] & of_rank[None, :], WIDE)
    last = _read(up, n[None, :] * rank + r[:, None], (n < outputs)[None, :] & of_rank[:, None], WIDE)
    if WIDE:
        total = tl.dot(_rounded(low, inner), last, total, input_precision="ieee")
    else:
        total = tl.dot(low.to(last.dtype), last, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    _write(result, m[:, None] * outputs + n[None, :], total, (m < tokens)[:, None] & (n < outputs)[None, :], WIDE)


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
