"""What the kernels compute, in plain torch, on any device: one function of each operation's name."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .changes import Change, gain_of
from .exact import Coefficient, exact_sum, round_once, to_odd, two_sum

__all__ = [
    "bake",
    "dora_gains",
    "fp8_scale",
    "inner_products",
    "linear_merge",
    "lora_backward",
    "lora_forward",
    "lora_linear",
    "low_rank",
    "random_words",
    "singular_factors",
    "sparse_merge",
    "total_change",
]

# Narrow dtypes: mantissa bits, exponent of the smallest normal number, largest value.
GRIDS = {
    torch.float16: (10, -14, 65504.0),
    torch.bfloat16: (7, -126, torch.finfo(torch.bfloat16).max),
    torch.float8_e4m3fn: (3, -6, 448.0),
    torch.float8_e5m2: (2, -14, 57344.0),
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOW = 0xFFFFFFFF
PORTION = 1 << 16  # elements at a time


def bake(
    weight: Tensor,
    changes: Sequence[Change],
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    key: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """round(W + sum_l t_l change_l), rounded once.

    Args:
        weight: W, of any strides.
        changes: With their strengths.
        dtype: Of the result.
        scale: Of an fp8 weight: one number, or one per row.
        key: Round at random, with Philox4x32-10's words of this key.

    Returns:
        The result and, for fp8, its scale: the largest magnitude becomes the largest code.
    """
    rows = weight.shape[0] if weight.ndim > 1 else 1
    if scale is None and key is None:
        matrix = weight.reshape(rows, prod(weight.shape) // rows)
        return _in_portions(matrix, changes, dtype).reshape(weight.shape), None
    values = weight.float().reshape(rows, prod(weight.shape) // rows)
    if scale is not None:
        values = values * scale.reshape(-1, 1)
    total = total_change(values, changes)
    high, low = two_sum(values.double(), total.double())
    new = None
    if dtype in FP8:
        assert scale is not None  # noqa: S101 - who writes fp8 reads fp8
        magnitude = (values + total).abs()
        most = magnitude.amax(1, keepdim=True) if scale.numel() > 1 else magnitude.amax().reshape(1, 1)
        new = fp8_scale(most, dtype)
        high, low = ((values + total) / new).double(), torch.zeros_like(high)
    if key is not None and dtype != torch.float32:
        result = _at_random(high, low, random_words(key, values.numel(), weight.device).reshape(high.shape), dtype)
    elif dtype in FP8:
        result = _nearest_fp8(high.float(), dtype)
    else:
        result, _ = round_once(to_odd(high, low), dtype)
    return result.reshape(weight.shape), new


def _in_portions(matrix: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """Some rows at a time, which the cache holds; float32 with the error of the sum beside it, as the kernel does."""
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    acting = [change for change in changes if change.strength]
    makers = [change.rows_of_delta() for change in acting]
    step = max(1, PORTION // max(matrix.shape[1], 1))
    for begin in range(0, len(matrix), step):
        weight = matrix[begin : begin + step].float()
        total = torch.zeros_like(weight)
        for change, make in zip(acting, makers, strict=True):
            top, bottom = max(begin, change.first), min(begin + len(weight), change.first + change.shape[0])
            if top < bottom:
                own, inside = slice(top - change.first, bottom - change.first), slice(top - begin, bottom - begin)
                total[inside] += _directed(change, make(own), weight[inside], own) * change.strength
        high, low = two_sum(weight, total)
        result[begin : begin + step] = _round_single(high, low, dtype)
    return result


def _directed(change: Change, delta: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """DoRA: (W + change) gain - W; the change itself where there is no gain."""
    if change.gain is None:
        return delta
    gain = change.gain[rows, None] if change.gain_axis == 0 else change.gain[None, :]
    return (weight + delta) * gain - weight


def _round_single(high: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """high + low (high the float32 next to it) in a narrower dtype, rounded once, by way of rounding to odd."""
    if dtype == torch.float32:
        return high
    bits = high.view(torch.int32)
    odd = (bits + ((low.view(torch.int32) ^ bits) >> 31)) | 1  # one less where the signs differ
    largest = GRIDS[dtype][2]
    return torch.where(low == 0, bits, odd).view(torch.float32).to(dtype).clamp_(-largest, largest)


def dora_gains(
    weights: Sequence[Tensor], changes: Sequence[Change], magnitudes: Sequence[Tensor], axes: Sequence[int]
) -> list[Tensor]:
    """magnitude / ||W + change||, layer by layer."""
    return [gain_of(*each) for each in zip(weights, changes, magnitudes, axes, strict=True)]


def inner_products(inputs: Sequence[Tensor]) -> Tensor:
    """<x_i, x_j> of tensors of one shape, float64 [N, N]."""
    flat = torch.stack([x.reshape(-1).double() for x in inputs])
    return flat @ flat.T


def linear_merge(
    inputs: Sequence[Tensor], coefficients: Sequence[Coefficient], dtype: torch.dtype
) -> tuple[Tensor, int]:
    """See `exact.exact_sum`."""
    return exact_sum(inputs, coefficients, dtype)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x down^T) up^T, as it is written; autograd does the rest."""
    return torch.nn.functional.linear(x, weight, bias) + (x @ down.T @ up.T) * scale


def lora_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y [M, N] and S = scale x down^T [M, r]: the plain formulation, three products."""
    inner = torch.mm(x, down.T).mul_(scale)
    base = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return torch.addmm(base, inner, up.T), inner


def lora_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    inner: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, down and up, where they are wanted: the plain formulation, five products."""
    low = torch.mm(gradient, up).mul_(scale)  # [M, r]
    for_x = torch.addmm(torch.mm(gradient, weight), low, down) if wanted[0] else None
    for_down = torch.mm(low.T, x) if wanted[1] else None
    for_up = torch.mm(gradient.T, inner) if wanted[2] else None
    return for_x, for_down, for_up


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank, up [o, r] and down [r, i], by the whole decomposition in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank].sqrt(), values[:rank, None].sqrt() * right[:rank]


def singular_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """up @ down in terms of its singular vectors, by the whole decomposition in float64."""
    return low_rank(up.double() @ down.double(), up.shape[1])


def total_change(values: Tensor, changes: Sequence[Change]) -> Tensor:
    """What is added to a matrix, float32: every change is made from the original values."""
    total = torch.zeros_like(values)
    for change in changes:
        rows = slice(change.first, change.first + change.shape[0])
        total[rows] += _directed(change, change.delta(), values[rows], slice(None)) * change.strength
    return total


def fp8_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales with which the largest magnitudes become the largest code; 1 for zeros."""
    scale = largest / GRIDS[dtype][2]
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def random_words(key: tuple[int, int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first words of a tensor, int64 [count]: word i % 4 of Philox4x32-10 of the counter i // 4.

    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    counter = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    c0, c1, c2, c3 = counter & LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:count]


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of 32 x 32 -> 64-bit products; int64 has no room for the sign, so it is done in halves."""
    low, high = words * (factor & 0xFFFF), words * (factor >> 16)  # 48 bits each
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def _at_random(high: Tensor, low: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 pairs on the grid of a dtype, above or below with chances that make the mean right."""
    mantissa, lowest, largest = GRIDS[dtype]
    value = (high + low).clamp(-4 * largest, 4 * largest) if dtype != torch.bfloat16 else high + low
    exponent = (value.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    spacing = exponent.clamp(min=2.0**lowest) * 2.0**-mantissa
    steps = torch.floor(value / spacing + (words >> 8).double() * 2.0**-24)
    grid = torch.copysign(steps * spacing, value).clamp(-largest, largest)
    return grid.float().to(dtype)


def _nearest_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    mantissa, lowest, largest = GRIDS[dtype]
    exponent = (values.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**lowest)
    magic = exponent * (1.5 * 2.0 ** (23 - mantissa))
    grid = torch.copysign(values + magic - magic, values)
    return grid.clamp(-largest, largest).to(dtype)


def sparse_merge(
    method: str,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: float,
    weights: Sequence[float],
    scale: float,
    normalize: bool,
    keys: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """DARE and TIES of one tensor in float32, operation by operation as the kernels and sdops do it."""
    wide = base.float()
    changes = [x.float() - wide for x in models]
    if method == "ties":
        changes = [torch.where(largest(change, density), change, 0.0) for change in changes]
    else:
        assert keys is not None  # noqa: S101 - SparseMerge has checked
        words = [random_words(key, wide.numel(), wide.device).reshape(wide.shape) for key in keys]
        single = torch.tensor(density, dtype=torch.float32, device=wide.device)
        kept = [(word >> 8).float() * 2.0**-24 < single for word in words]
        divisor = torch.where(single > 0, single, torch.ones_like(single))
        changes = [torch.where(mask, change, 0.0) / divisor for mask, change in zip(kept, changes, strict=True)]
    weighted = [change * weight for change, weight in zip(changes, weights, strict=True)]
    total = _fold(weighted)
    if method != "dare_linear":
        direction = torch.copysign(torch.ones_like(total), total)
        agreeing = [(each * direction).clamp_min(0) for each in weighted]
        total = _fold(agreeing) * direction
        if normalize:
            divisor = _fold([(each > 0).float() * weight for each, weight in zip(agreeing, weights, strict=True)])
            total = total / (divisor + (divisor == 0).float())
    elif normalize:
        total = total / torch.tensor(sum(weights), dtype=torch.float32, device=wide.device)
    return wide + total * scale


def largest(change: Tensor, density: float) -> Tensor:
    """Which elements are among the int(density n) largest magnitudes; of equals the first are."""
    flat = change.reshape(-1).abs()
    count = min(flat.numel(), max(1, int(density * flat.numel()))) if density else 0
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order] = True
    return mask.reshape(change.shape)


def _fold(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
