"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): each channel of the weight is multiplied. Two forms:

weight, on_input   LyCORIS: delta = W * weight, along the input channels if on_input is 1, else along the output
                   channels; weight [o] or [i], for convolutions [1, o, 1, 1] or [1, i, 1, 1]; 0 = no change
multiplier         PEFT's `ia3_l` = 1 + weight: [o, 1] or [1, i], and the bias is multiplied with the outputs. For
                   convolutions both are [1, channels, 1, 1]; only `feedforward_modules` of PEFT's configuration
                   tells the inputs (`on_input` of the settings)
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
    number,
    refused,
    unfit,
    working,
)
from sdops.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ()
OPTIONAL = ("weight", "on_input", "multiplier")
NEEDS_WEIGHT = ("weight", "multiplier")


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes; which axis they are for is known only with the value of `on_input`.

    Raises:
        FormatError: it is no vector, or there are two.
        MismatchError: it fits neither axis of the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    if "multiplier" in shapes:
        part, others = "multiplier", ("weight", "on_input")
        for other in others:
            if other in shapes:
                raise refused(other, shapes[other], "it does not belong to `multiplier`")
    else:
        part = "weight"
        for needed_part in ("weight", "on_input"):
            if needed_part not in shapes:
                raise missing(needed_part, shapes)
    own = shapes[part]
    if prod(own) != max(own, default=1):
        raise refused(part, own, "it should be a vector")
    if shape is not None and prod(own) not in shape[:2]:
        raise unfit(part, own, shape)
    return Facts(None, None, None, bias_if_any=part == "multiplier")


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape.

    Raises:
        SdopsError: there is no weight.
        FormatError: nothing tells the axis.
        MismatchError: the vector is not as long as its axis.
    """
    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "(IA)^3")
    chosen = Settings(**settings)
    axis = 1 if is_on_input(parts, chosen) else 0
    vector = _change(parts, shape, axis)
    return weight * (chosen.strength * vector.reshape([-1 if dim == axis else 1 for dim in range(len(shape))]))


def bias_delta(parts: Parts, _shape: Shape, bias: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The change of the bias [o]: PEFT multiplies it with the outputs. None if it stays, or there is none.

    Raises:
        MismatchError: there is not one number for each output.
    """
    floats, bias = working(parts, bias)
    chosen = Settings(**settings)
    if bias is None or "multiplier" not in parts or is_on_input(parts, chosen):
        return None
    return bias * (chosen.strength * _change(floats, tuple(bias.shape), 0))


def is_on_input(parts: Parts, settings: Settings) -> bool:
    """Whether the channels are the inputs.

    Raises:
        FormatError: nothing tells.
    """
    if "on_input" in parts:
        return bool(number(parts["on_input"]))
    if settings.on_input is not None:
        return settings.on_input
    own = tuple(parts["multiplier"].shape)
    if len(own) != 2 or own == (1, 1):
        raise FormatError(
            f"`multiplier` of shape {list(own)} may be for inputs or outputs, and nothing tells which",
            hint="PEFT's `adapter_config.json` does, by `feedforward_modules`: put it beside the file",
            part="multiplier",
        )
    return own[0] == 1


def _change(parts: Parts, shape: Shape, axis: int) -> Tensor:
    """What the channels along an axis change by, as a vector."""
    part, unchanged = ("multiplier", 1) if "multiplier" in parts else ("weight", 0)
    vector = parts[part].reshape(-1) - unchanged
    if shape[axis : axis + 1] != tuple(vector.shape):
        raise unfit(part, tuple(parts[part].shape), shape)
    return vector
