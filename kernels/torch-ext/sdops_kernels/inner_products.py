"""<x_i, x_j> of N models, tensor by tensor, in float64: what slerp and its relatives must know before they merge.

    gram = inner_products([model_a, model_b])          float64 [tensors, N, N], on the CPU

Sums are made in an order that does not depend on the device's size, so they are the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._registration import register
from ._tables import CODES, address_table, default_backend, same_device, warps

__all__ = ["inner_products"]

BLOCK, BLOCKS = 1024, 64  # elements at once, and how many of those a program adds up
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def inner_products(models: Sequence[Sequence[Tensor]], *, backend: str | None = None) -> Tensor:
    """Inner products of the t-th tensors of all models, for every t.

    Args:
        models: N lists of tensors: float16, bfloat16 or float32, contiguous, the t-th of equal shape in all lists.
        backend: `triton`, `torch`, or None: Triton where there is a GPU.

    Returns:
        float64 [tensors, N, N], on the CPU, where whoever asks makes coefficients of them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    inputs = [list(each) for each in zip(*models, strict=True)]  # [tensors][N]
    if not inputs:
        return torch.zeros(0, len(models), len(models), dtype=torch.float64)
    for place, own in enumerate(inputs):
        if any(x.shape != own[0].shape or x.dtype not in DTYPES or not x.is_contiguous() for x in own):
            raise ValueError(f"tensor {place}: wanted are equal shapes, contiguous, float16, bfloat16 or float32")
    device = same_device([x for own in inputs for x in own])
    gram = torch.zeros(len(inputs), len(models), len(models), dtype=torch.float64)
    by_kernel: dict[tuple[int, bool], list[int]] = {}
    for place, own in enumerate(inputs):
        if (backend or default_backend(device)) == "torch" or len({x.dtype for x in own}) > 1:
            gram[place] = reference.inner_products(own).cpu()
        elif own[0].numel():
            whole = own[0].numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in own)
            by_kernel.setdefault((CODES[own[0].dtype], whole), []).append(place)
    for (code, whole), places in by_kernel.items():
        gram[places] = _launch([inputs[place] for place in places], code, device, whole=whole)
    return gram


def _launch(inputs: Sequence[Sequence[Tensor]], code: int, device: torch.device, *, whole: bool) -> Tensor:
    """Those of tensors of one dtype, [tensors, N, N]."""
    from ._inner_products_kernels import add_products

    count = len(inputs[0])
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    runs = [-(-own[0].numel() // (BLOCK * BLOCKS)) for own in inputs]
    first = torch.tensor([0, *runs], dtype=torch.int64).cumsum(0).int()
    sums = torch.empty(int(first[-1]), len(pairs), dtype=torch.float64, device=device)
    add_products[(len(pairs) * len(sums),)](
        address_table([[own[0].numel(), *(x.data_ptr() for x in own)] for own in inputs], device),
        first.to(device),
        sums,
        len(inputs),
        N=count,
        PAIRS=len(pairs),
        CODE=code,
        ALIGNED=whole,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=warps(),
        enable_fp_fusion=False,
    )
    totals = torch.segment_reduce(sums.cpu(), "sum", lengths=torch.tensor(runs))  # one after another
    gram = torch.zeros(len(inputs), count, count, dtype=torch.float64)
    for place, (i, j) in enumerate(pairs):
        gram[:, i, j] = gram[:, j, i] = totals[:, place]
    return gram


def _op(inputs: list[Tensor], models: int) -> Tensor:
    tensors = len(inputs) // models
    return inner_products([inputs[i * tensors : (i + 1) * tensors] for i in range(models)])


def _fake(inputs: list[Tensor], models: int) -> Tensor:
    return torch.empty(len(inputs) // models, models, models, dtype=torch.float64)


register("inner_products", "(Tensor[] inputs, int models) -> Tensor", _op, _fake)
