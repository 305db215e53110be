"""DoRA (Liu et al. 2024, arXiv:2402.09353): a magnitude on top of any family that adds to the weight.

    V = W + delta,   W' = m V / ||V||,   the norm per output or per input channel

Two parts hold m, because writers disagree on the axis:

    magnitude    [o], or [1, o, 1, 1] for convolutions: always per output (PEFT, diffusers, ai-toolkit)
    dora_scale   [o, 1, ...] or [o]: per output; [1, i, ...]: per input (LyCORIS, OneTrainer, kohya)

Strength t is W + t (W' - W), so that 0 leaves W alone and strengths are linear. PEFT scales delta before the norm
instead (`strength`), which at t = 0 is m W / ||W||, not W.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sdops.adapters._parts import Parts, Settings, Shape, Shapes, needed, refused, unfit

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("dora_scale", "magnitude")


def check(shapes: Shapes, rows: int, shape: Shape | None) -> None:
    """Check the magnitude's shape, if there is one.

    Args:
        shapes: Of all parts.
        rows: Output channels, as the other parts tell.
        shape: Of the base weight, if known.

    Raises:
        FormatError: there are two magnitudes, or one that is no vector.
        MismatchError: the vector has another length than the axis it is for.
    """
    found = [part for part in PARTS if part in shapes]
    if not found:
        return
    part, own = found[0], shapes[found[0]]
    if len(found) > 1:
        raise refused(found[1], shapes[found[1]], f"there is a `{found[0]}` as well")
    if prod(own) != max(own, default=1):
        raise refused(part, own, "it should be a vector")
    if is_per_output(part, own, rows):
        if prod(own) != rows:
            raise refused(part, own, f"the other parts ask for {rows} numbers")
    elif shape is not None and shape[1:2] != (prod(own),):
        raise unfit(part, own, shape)


def is_per_output(part: str, shape: Shape, rows: int) -> bool:
    """Whether a magnitude of that shape is one number per output channel."""
    return part == "magnitude" or len(shape) < 2 or shape[0] != 1 or prod(shape) == 1 == rows


def applied(additive: Tensor, parts: Parts, weight: Tensor | None, settings: Settings) -> Tensor:
    """W' - W for the change that the family adds, or that change itself if there is no magnitude.

    Args:
        additive: The family's change, in the weight's shape.
        parts: All parts.
        weight: W.
        settings: `strength` scales the change.
    """
    import torch

    additive = additive if settings.strength == 1 else settings.strength * additive
    part = next((part for part in PARTS if part in parts), None)
    if part is None:
        return additive
    weight = needed(weight, tuple(additive.shape), "DoRA")
    axis = 0 if is_per_output(part, tuple(parts[part].shape), weight.shape[0]) else 1
    magnitude = parts[part].reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])

    directed = weight + additive
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm: Tensor = torch.linalg.vector_norm(directed, dim=others, keepdim=True) + torch.finfo(directed.dtype).eps
    return directed * (magnitude / norm) - weight
