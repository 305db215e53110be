"""Plain differences and replaced tensors: what needs no family. Norms and biases are written so.

    diff      [o, i, ...] or [o]: added to the weight          diff_b   [o]: added to the bias
    set       takes the weight's place                         set_b    takes the bias's place
    reshape   the shape to which the base weight is zero-padded first (ComfyUI); the caller passes it as `shape`

A patch may have parts for the weight, for the bias, or for both.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from sdops.adapters._parts import (
    Facts,
    Parts,
    Settings,
    Shape,
    Shapes,
    check_names,
    missing,
    needed,
    refused,
    unfit,
    without_ones,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ()
OPTIONAL = ("diff", "set", "diff_b", "set_b", "reshape")
NEEDS_WEIGHT = ("set", "set_b")


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: there is no part, or there are two for one tensor.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    for added, replaced in (("diff", "set"), ("diff_b", "set_b")):
        if added in shapes and replaced in shapes:
            raise refused(replaced, shapes[replaced], f"there is a `{added}` as well")
    if not any(part in shapes for part in ("diff", "set", "diff_b", "set_b")):
        raise missing("diff", shapes)
    weight = next((part for part in ("diff", "set") if part in shapes), None)
    bias = next((part for part in ("diff_b", "set_b") if part in shapes), None)
    rows = columns = None
    if bias is not None:
        rows = prod(shapes[bias])
        if shape is not None and rows != shape[0]:
            raise unfit(bias, shapes[bias], shape)
    if weight is not None:
        own = shapes[weight]
        rows, columns = own[0] if own else 1, prod(own[1:])
        if shape is not None and without_ones(own) != without_ones(shape):
            raise unfit(weight, own, shape)
    return Facts(None, rows, columns, weight=weight is not None, bias=bias is not None)


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The difference, or `set` minus the weight; zeros if only the bias changes.

    Raises:
        SdopsError: the weight is replaced, and there is none.
    """
    import torch

    floats, weight = working(parts, weight)
    strength = Settings(**settings).strength
    if "diff" in parts:
        return strength * floats["diff"].reshape(shape)
    if "set" in parts:
        return strength * (floats["set"].reshape(shape) - needed(weight, shape, "a replaced tensor"))
    return torch.zeros(shape, dtype=floats[next(iter(parts))].dtype)


def bias_delta(parts: Parts, _shape: Shape, bias: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The difference [o], or `set_b` minus the bias; None if the bias stays.

    Raises:
        SdopsError: the bias is replaced, and there is none.
    """
    floats, bias = working(parts, bias)
    strength = Settings(**settings).strength
    if "diff_b" in parts:
        return strength * floats["diff_b"].reshape(-1)
    if "set_b" in parts:
        replaced = floats["set_b"].reshape(-1)
        return strength * (replaced - needed(bias, tuple(replaced.shape), "a replaced tensor"))
    return None
