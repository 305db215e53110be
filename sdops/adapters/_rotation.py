"""Rotations from skew matrices, and their constraint, for oft and boft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.adapters._parts import Parts, Settings, Shape, Shapes, check_shape, number

if TYPE_CHECKING:
    from torch import Tensor


def check_rescale(shapes: Shapes, rows: int) -> None:
    """Raises FormatError unless `rescale`, if there is one, is a number per output channel."""
    if "rescale" in shapes:
        check_shape("rescale", shapes["rescale"], (rows,))


def rotations(parts: Parts, rows: int, settings: Settings) -> Tensor:
    """R = (I + Q) (I - Q)^-1 with Q = B - B^T for the `blocks` B [..., b, b]; orthogonal, I where B is 0.

    If the Frobenius norm of all Q together exceeds the constraint c, Q is scaled down to it; no or c = 0: no limit. In
    LyCORIS and kohya c is the stored number times the output channels; ComfyUI takes the number itself.
    """
    blocks = parts["blocks"]
    skew = blocks - blocks.mT
    constraint = number(parts["constraint"]) if "constraint" in parts else 0.0
    if constraint > 0:
        limit = constraint * rows if settings.constraint_per_channel else constraint
        norm = skew.norm()
        if norm > limit:
            skew = skew * (limit / norm)
    return cayley(skew)


def cayley(skew: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1 of skew matrices Q [..., b, b]."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # Both factors commute, so that solving (I - Q) R = I + Q is the same.
    rotation: Tensor = torch.linalg.solve(identity - skew, identity + skew)
    return rotation


def rescaled(rotated: Tensor, weight: Tensor, parts: Parts, shape: Shape) -> Tensor:
    """rescale * rotated - W, in the weight's shape."""
    rotated = rotated.reshape(shape)
    if "rescale" in parts:
        rotated = rotated * parts["rescale"].reshape([-1] + [1] * (len(shape) - 1))
    return rotated - weight
