"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638), as LyCORIS writes it: each channel of the weight is multiplied.

delta = W * weight,   along the input channels if on_input is 1, else along the output channels

weight     [o] or [i], for convolutions [1, o, 1, 1] or [1, i, 1, 1]; 0 = no change
on_input   0 or 1
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
    needed,
    number,
    refused,
    unfit,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("weight", "on_input")
OPTIONAL = ()
NEEDS_WEIGHT = REQUIRED


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes; which axis they are for is known only with the value of `on_input`.

    Raises:
        FormatError: it is no vector.
        MismatchError: it fits neither axis of the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    own = shapes["weight"]
    if prod(own) != max(own, default=1):
        raise refused("weight", own, "it should be a vector")
    if shape is not None and prod(own) not in shape[:2]:
        raise unfit("weight", own, shape)
    return Facts(None, None, None)


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape.

    Raises:
        SdopsError: there is no weight.
        MismatchError: the vector is not as long as the axis that `on_input` names.
    """
    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "(IA)^3")
    vector = parts["weight"].reshape(-1)
    axis = 1 if number(parts["on_input"]) else 0
    if len(vector) != shape[axis]:
        raise unfit("weight", tuple(parts["weight"].shape), shape)
    return weight * (
        Settings(**settings).strength * vector.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
    )
