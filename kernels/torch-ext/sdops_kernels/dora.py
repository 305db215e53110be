"""DoRA's gains of all layers at once: magnitude / ||W + change||, per output or per input channel.

    gains = dora_gains(weights, changes, magnitudes)      one launch for all layers of a kind

A gain belongs to the change at strength 1, so it is made once, when a LoRA is loaded: `bake` takes it along.
Source: https://arxiv.org/abs/2402.09353; per input channel as LyCORIS has it (`wd_on_output` off).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._registration import register
from ._tables import CODES, address_table, default_backend, device_of, same_device
from .bake import MIXED_TILE, SMALL_TILE, are_aligned, common_dtype, kinds_of, product_options
from .changes import EPSILON, Change, LoRA

__all__ = ["dora_gains"]

PROGRAMS = 4  # per multiprocessor


def dora_gains(
    weights: Sequence[Tensor],
    changes: Sequence[Change],
    magnitudes: Sequence[Tensor],
    axes: Sequence[int] | None = None,
    *,
    scales: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """The gains of changes, see `Change.gain`.

    Args:
        weights: The rows that each change is for, [rows, ...]: float16, bfloat16, float32, or fp8 with scales.
        changes: One per weight, without gain.
        magnitudes: Per change one number per output channel, or per input channel.
        axes: Per change 0 = output channels, 1 = input channels; none = outputs for all.
        scales: For fp8 weights, as for `Bake`.
        backend: `triton`, `torch`, or None: Triton where there is a GPU.

    Returns:
        float32: one number per row, or one per column of the weight as a matrix.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    axes, scales = list(axes or [0] * len(weights)), list(scales or [None] * len(weights))
    for weight, change in zip(weights, changes, strict=True):
        if change.shape != (len(weight), prod(weight.shape[1:])):
            raise ValueError(f"a change of {list(change.shape)} for rows of shape {list(weight.shape)}")
    if not weights:
        return []
    device = same_device(weights)
    if (backend or default_backend(device)) == "torch":
        return reference.dora_gains(_widened(weights, scales), changes, magnitudes, axes)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    flat = [_matrix(weight) for weight in weights]
    for place, (weight, change) in enumerate(zip(flat, changes, strict=True)):
        factor = common_dtype([change])
        whole, high = are_aligned([weight], [change]), change.rank >= 64
        kind = (CODES[weight.dtype], factor, kinds_of([change]), whole, high, axes[place])
        kinds.setdefault(kind, []).append(place)
    found: dict[int, Tensor] = {}
    for kind, places in kinds.items():
        own = [[items[place] for place in places] for items in (flat, changes, scales)]
        sums = _launch(*own, kind, device)
        found |= dict(zip(places, sums, strict=True))
    squares = [_per_channel(found[place], weights[place], axes[place]) for place in range(len(weights))]
    gains = torch.cat([m.reshape(-1).float() for m in magnitudes]) / (torch.cat(squares).sqrt() + EPSILON)
    split = gains.split([len(own) for own in squares])
    return [_per_column(gain, weights[place], axes[place]) for place, gain in enumerate(split)]


def _launch(
    weights: Sequence[Tensor], changes: Sequence[Change], scales: Sequence[Any], kind: tuple[Any, ...], device: Any
) -> list[Tensor]:
    """Sums of squares along rows or columns of W + change."""
    from ._dora_kernels import add_squares

    code, factor, mask, whole, high, axis = kind
    tile = MIXED_TILE if factor == torch.float32 else SMALL_TILE
    options = product_options(changes, device, high=high)
    if factor == torch.float32 and options["PRECISION"] == "ieee" and device.type == "cuda" and not torch.version.hip:
        options["PRECISION"] = "tf32x3"  # as good, and needs fewer registers
    problems, segments, kept, first, sizes, read = [], [], [], [0], [], list[Tensor]()
    filled = scaled = 0  # sums and scales of the problems before
    for place, (weight, change, scale) in enumerate(zip(weights, changes, scales, strict=True)):
        entry, used = replace(change, first=0).entry(factor)
        segments.append(entry)
        kept.append(used)
        step = int(scale is not None and scale.numel() > 1)
        address = [weight.data_ptr(), filled, weight.stride(0), 0]
        problems.append([*address, *weight.shape, place, place + 1, scaled, step])
        if scale is not None:
            read.append(scale.reshape(-1).float())
            scaled += scale.numel()
        sizes.append(weight.shape[axis])
        filled += weight.shape[axis]
        first.append(first[-1] + -(-weight.shape[axis] // tile[axis]))
    sums = torch.empty(filled, dtype=torch.float32, device=device)
    share = -(-first[-1] // min(first[-1], device_of(device) * PROGRAMS))
    add_squares[(-(-first[-1] // share),)](
        address_table(problems, device),
        address_table(segments, device),
        torch.tensor([change.scale for change in changes], dtype=torch.float32).to(device),
        torch.cat(read) if read else sums,
        torch.tensor(first, dtype=torch.int32).to(device),
        sums,
        len(weights),
        first[-1],
        share,
        BASE=code,
        FACTOR=CODES[factor],
        KINDS=mask,
        ALIGNED=whole,
        AXIS=axis,
        BM=tile[0],
        BN=tile[1],
        **options,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return list(sums.split(sizes))


def _matrix(weight: Tensor) -> Tensor:
    flat = weight.reshape(len(weight), -1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _widened(weights: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    """fp8 weights times their scales."""
    return [
        weight if scale is None else weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        for weight, scale in zip(weights, scales, strict=True)
    ]


def _per_channel(sums: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Columns of one input channel together."""
    return sums.reshape(weight.shape[1], -1).sum(1) if axis and weight.ndim > 2 else sums


def _per_column(gain: Tensor, weight: Tensor, axis: int) -> Tensor:
    return gain.repeat_interleave(prod(weight.shape[2:])) if axis and weight.ndim > 2 else gain


def _op(
    weights: list[Tensor], ups: list[Tensor], downs: list[Tensor], scales: list[float], magnitudes: list[Tensor]
) -> list[Tensor]:
    changes = [LoRA(up, down, scale) for up, down, scale in zip(ups, downs, scales, strict=True)]
    return [gain.clone() for gain in dora_gains(weights, changes, magnitudes)]  # results may not share memory


def _fake(weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [own.new_empty(len(own), dtype=torch.float32) for own in weights]


register(
    "dora_gains",
    "(Tensor[] weights, Tensor[] ups, Tensor[] downs, float[] scales, Tensor[] magnitudes) -> Tensor[]",
    _op,
    _fake,
)
