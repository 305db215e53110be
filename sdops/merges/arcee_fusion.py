"""Take only the changes that stand out by size and by effect on their row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EXECUTION = "tensor"

# Elements per block, so that the float64 values of the softmax stay small.
BLOCK = 1 << 20


def arcee_fusion(base: Tensor, a: Tensor) -> Tensor:
    """a where I >= median(I) + 1.5 (q3(I) - q1(I)), else base;   I = |a - base| KL(softmax(a) || softmax(base)).

    The softmax and the divergence are over the last dimension, with 1e-8 added to every probability. Quartile q of n
    values is the one at place floor(q (n - 1)) in order of size. Above a million elements mergekit estimates the
    quartiles from a random sample; here they are exact.

    Source: arcee-ai/mergekit, `arcee_fusion`.
    """
    if base.numel() == 0:
        return base.clone()
    importance = _importance(a, base)
    last = importance.numel() - 1
    places = [last // 4, last // 2, 3 * last // 4]
    low, median, high = np.partition(importance.cpu().numpy(), places)[places].tolist()
    chosen = importance >= median + 1.5 * (high - low)
    return torch.where(chosen.reshape(base.shape), a, base)


def _importance(a: Tensor, base: Tensor) -> Tensor:
    """|a - base| times the divergence of its last-dimension row, float64 rounded to float32, flat."""
    width = base.shape[-1] if base.ndim else 1
    height = max(1, BLOCK // width)
    rows, base_rows = (torch.split(tensor.reshape(-1, width), height) for tensor in (a, base))
    blocks = []
    for x, y in zip(rows, base_rows, strict=True):
        x, y = x.double(), y.double()
        p, q = x.softmax(1) + 1e-8, y.softmax(1) + 1e-8
        # p log(p / q) in float32 would lose the small divergence of two close rows to cancellation.
        divergence = (p * (p / q).log()).sum(1, keepdim=True)
        blocks.append(((x - y).abs() * divergence).float().reshape(-1))
    return torch.cat(blocks)
