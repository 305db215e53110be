"""What all families share: facts about a patch, checks of its shapes, the scale, floats to compute with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING

from sdops.errors import FormatError, MismatchError, SdopsError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Parts = Mapping[str, "Tensor"]
Shapes = Mapping[str, Shape]

NUMBERS = ("lora_alpha", "constraint", "on_input", "scaled")  # parts that hold one number
INSPECT = "see what the file holds with `sdops inspect FILE`"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the shapes of a patch tell.

    Attributes:
        rank: What alpha is divided by; None for families without.
        rows, columns: Of the changed weight as a matrix, o and i kh kw; None if the shapes leave it open.
        weight, bias: Whether the module's weight, its bias is changed.
    bias_if_any: Whether its bias is changed if it has one.
    """

    rank: int | None
    rows: int | None
    columns: int | None
    weight: bool = True
    bias: bool = False
    bias_if_any: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What is not a tensor, as the shelf's docstring explains it; each family uses what concerns it."""

    lora_alpha: float | None = None
    use_rslora: bool = False
    rank: int | None = None
    strength: float = 1.0
    neumann_terms: int = 5
    constraint_per_channel: bool = True
    rotates_input: bool = False
    on_input: bool | None = None


# --- checks ---------------------------------------------------------------------------------------------------------


def check_names(shapes: Shapes, required: Collection[str], optional: Collection[str]) -> None:
    """Raises FormatError if a part is missing, unknown, empty, or should be one number and is not."""
    for part in required:
        if part not in shapes:
            raise missing(part, shapes)
    for part, shape in shapes.items():
        if part not in required and part not in optional:
            raise refused(part, shape, "does not belong here")
        if 0 in shape:
            raise refused(part, shape, "it is empty")
        if part in NUMBERS and prod(shape) != 1:
            raise refused(part, shape, "it should be one number")


def check_shape(part: str, shape: Shape, wanted: Shape) -> None:
    """Raises FormatError unless a part has the shape that the other parts ask for; trailing 1s do not count."""
    if without_ones(shape) != without_ones(wanted):
        raise refused(part, shape, f"the other parts ask for {list(wanted)}")


def check_weight(facts: Facts, shape: Shape | None, part: str, part_shape: Shape) -> Facts:
    """Raises MismatchError, which names the part, unless the facts fit the weight's shape."""
    if shape is not None and (
        (facts.rows is not None and facts.rows != shape[0])
        or (facts.columns is not None and facts.columns != prod(shape[1:]))
    ):
        raise unfit(part, part_shape, shape)
    return facts


def check_kernel(part: str, part_shape: Shape, shape: Shape | None) -> None:
    """Raises MismatchError unless the kernel of a part [r, i, kh, kw] is the weight's; flattened ones pass."""
    if shape is not None and len(part_shape) > 2 and without_ones(part_shape[1:]) != without_ones(shape[1:]):
        raise unfit(part, part_shape, shape)


def without_ones(shape: Shape) -> Shape:
    """A shape without the 1s at its end: those of a 1x1 kernel."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def missing(part: str, shapes: Shapes) -> FormatError:
    """The error for a part that is not there."""
    there = ", ".join(f"`{name}`" for name in shapes)
    return FormatError(f"part `{part}` is missing beside {there or 'nothing'}", hint=INSPECT, part=part)


def refused(part: str, shape: Shape, reason: str) -> FormatError:
    """The error for a part that cannot be what it says."""
    return FormatError(f"part `{part}` of shape {list(shape)}: {reason}", hint=INSPECT, part=part)


def unfit(part: str, part_shape: Shape, shape: Shape) -> MismatchError:
    """The error for a part that is for a weight of another shape."""
    return MismatchError(
        f"part `{part}` of shape {list(part_shape)} does not fit a weight of shape {list(shape)}",
        hint="the file is for another model: compare `sdops inspect` of both",
        part=part,
    )


# --- numbers --------------------------------------------------------------------------------------------------------


def scale_of(parts: Parts, rank: int, settings: Settings) -> float:
    """alpha / r, alpha / sqrt(r) under rsLoRA, or 1 where there is no alpha.

    Raises:
        FormatError: alpha is 0, which some programs take for "nothing" and others for "alpha = r", or not finite.
    """
    lora_alpha = settings.lora_alpha
    if lora_alpha is None and "lora_alpha" in parts:
        lora_alpha = number(parts["lora_alpha"])
    if lora_alpha is None:
        return 1.0
    if lora_alpha == 0 or not isfinite(lora_alpha):
        raise FormatError(
            f"part `lora_alpha` is {lora_alpha:g}, and programs disagree on what that means",
            hint="train or save the file again with an alpha; none at all means alpha = rank",
            part="lora_alpha",
        )
    return lora_alpha / (sqrt(rank) if settings.use_rslora else rank)


def number(part: Tensor) -> float:
    """The one number that a part holds, whatever its dtype and shape."""
    return float(part.detach().reshape(-1)[0])


def working(parts: Parts, weight: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
    """The parts and the weight in the dtype to compute in: float32, or float64 if one of them is."""
    import torch

    tensors = [part for name, part in parts.items() if name not in NUMBERS]
    tensors += [] if weight is None else [weight]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    floats = {name: part if name in NUMBERS else part.to(dtype) for name, part in parts.items()}
    return floats, None if weight is None else weight.to(dtype)


def needed(weight: Tensor | None, shape: Shape, family: str) -> Tensor:
    """The base weight in `shape`, zero-padded if it is smaller (`reshape`).

    Raises:
        SdopsError: there is none, and the family's delta depends on it.
    """
    if weight is None:
        raise SdopsError(
            f"what {family} changes depends on the weights it was made for",
            hint="give the checkpoint that it is for with `--base`",
            family=family,
        )
    return padded(weight, shape)


def padded(weight: Tensor, shape: Shape) -> Tensor:
    """A weight with zeros appended to each dimension up to `shape`; trailing 1s are added or dropped.

    Raises:
        MismatchError: the weight is larger than that.
    """
    from torch.nn.functional import pad

    own = tuple(weight.shape)
    if without_ones(own) == without_ones(shape):
        return weight.reshape(shape)
    if len(own) != len(shape) or any(have > want for have, want in zip(own, shape, strict=True)):
        raise unfit("reshape", shape, own)
    amounts = [x for have, want in zip(own[::-1], shape[::-1], strict=True) for x in (0, want - have)]
    return pad(weight, amounts)


def unfolded(mid: Tensor, down: Tensor) -> Tensor:
    """The plain `down` [r, i, k] of a Tucker core mid [r, r', k] and down [r', i]: sum_n mid[m, n, k] down[n, i]."""
    import torch

    return torch.einsum("mn...,ni->mi...", mid, down.flatten(1))
