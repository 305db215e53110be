"""Turn one model's weights towards another's without changing their lengths and angles."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._rotation import Rotation

EXECUTION = "tensor"


def rotate(a: Tensor, b: Tensor, *, alignment: float = 1.0, alpha: float = 0.0, centralization: float = 1.0) -> Tensor:
    """(a' + alpha (b' Q^-1 - a')) Q^alignment + (1 - alignment) m_a + alignment m_b,   Q = argmin |a' Q - b'|.

    Q is orthogonal, a' = a - m_a, b' = b - m_b, m = centralization * the mean row. Tensors are matrices (out, in),
    convolutions larger than 1x1 (out in, kh kw). Q = U V^T where a'^T b' = U S V^T (orthogonal Procrustes problem).
    For a fractional alignment Q must be a rotation: a reflection is undone in the direction of the smallest singular
    value. Where there are fewer rows than columns, Q is open outside the rows' span and chosen near to no rotation.

    alignment 0 and alpha 0 is a, both 1 is b. Vectors and single numbers: a + alpha (b - a).

    Source: ljleb/sd-mecha, `rotate`, but for wide matrices, where its transform is not orthogonal.

    Args:
        alignment (0 to 1): How far to turn, 0 = not at all, 1 = onto b as well as a rotation can.
        alpha: Share of b in what a rotation cannot change.
        centralization: Share of the mean row that is taken out before and moved over straight.

    Raises:
        UsageError: the alignment is outside [0, 1].
    """
    if not 0 <= alignment <= 1:
        raise UsageError(f"`alignment` is {alignment:g}", hint="choose it from 0 to 1", knob="alignment")
    if a.ndim < 2 or a.numel() == 0 or torch.equal(a, b) or (alignment == alpha and alpha in (0, 1)):
        return torch.lerp(a, b, alpha)
    x, y = _matrix(a).double(), _matrix(b).double()
    mean_x, mean_y = centralization * x.mean(0), centralization * y.mean(0)
    x, y = x - mean_x, y - mean_y
    rotation = Rotation.between(x, y)
    if alpha:
        x = torch.lerp(x, rotation.undo(y), alpha)
    turned = rotation.apply(x, alignment) + torch.lerp(mean_x, mean_y, alignment)
    return turned.reshape(a.shape).to(a.dtype)


def _matrix(x: Tensor) -> Tensor:
    """(out, in), or (out in, kh kw) for a convolution larger than 1x1."""
    larger = x.ndim > 2 and x[0, 0].numel() > 1
    return x.flatten(0, 1).flatten(1) if larger else x.flatten(1)
