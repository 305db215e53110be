"""GLoRA (Chavan et al. 2023, arXiv:2306.07967; LyCORIS): a change that depends on the weight.

    delta = s (W a1 a2 + b1 b2),   W times a1 over the input channels

    a1 [i, r], a2 [r, i], b1 [o, r], b2 [r, i kh kw]; convolutions keep kernels: a1 [i, r, 1, 1], ..., b2 [r, i, kh, kw]
    bm [r, r, kh, kw] with b2 [r, i, 1, 1]: as `mid` of a LoRA

The first files have each matrix transposed and the products turned round, delta = s ((W a2) a1 + b2 b1); shapes tell
them apart, but for o = i = r, which is read as above. alpha / r is as the file says; LyCORIS does not write what
rsLoRA training used.
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
    check_kernel,
    check_names,
    check_shape,
    check_weight,
    needed,
    refused,
    scale_of,
    unfit,
    unfolded,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("a1", "a2", "b1", "b2")
OPTIONAL = ("bm", "lora_alpha")
NEEDS_WEIGHT = REQUIRED


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    for part in REQUIRED:
        if len(shapes[part]) < 2:
            raise refused(part, shapes[part], "it should have two or more dimensions")
    a1, a2, b1, b2 = _orientation(shapes, shape)
    rank, rows, channels = shapes[a2][0], shapes[b1][0], shapes[a1][0]
    kernel = shapes["bm"][2:] if "bm" in shapes else shapes[b2][2:]
    check_shape(a1, shapes[a1], (channels, rank))
    check_shape(a2, shapes[a2], (rank, channels))
    check_shape(b1, shapes[b1], (rows, rank))
    if "bm" in shapes:
        check_shape("bm", shapes["bm"], (rank, rank, *kernel))
        check_shape(b2, shapes[b2], (rank, channels))
    else:
        check_shape(b2, shapes[b2], (rank, channels, *kernel))
    check_kernel("bm" if "bm" in shapes else b2, (rank, channels, *kernel), shape)
    if shape is not None and shape[1:2] != (channels,):  # W a1 is over the channels, whatever the columns of b2 are
        raise unfit(a1, shapes[a1], shape)
    wrong = b1 if shape is not None and shape[0] != rows else b2
    return check_weight(Facts(rank, rows, channels * prod(kernel)), shape, wrong, shapes[wrong])


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape, in O(o i r): the weight is needed.

    Raises:
        SdopsError: there is no weight.
    """
    import torch

    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "GLoRA")
    a1, a2, b_up, b_down = _matrices(parts, shape)
    turned = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    return _scale(parts, len(a2), settings) * (turned + (b_up @ b_down).reshape(shape))


def factors(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor] | None:
    """Up [W a1, b1], down [a2; b2]: rank 2 r, or r (kh kw + 1) for convolutions, where a2 acts on each kernel element.

    Raises:
        SdopsError: there is no weight.
    """
    import torch

    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "GLoRA")
    a1, a2, b_up, b_down = _matrices(parts, shape)
    turned = torch.einsum("oi...,ir->or...", weight, a1).flatten(1)  # [o, r kh kw]
    kernel = torch.eye(prod(shape[2:]), dtype=a2.dtype, device=a2.device)
    up = torch.cat([turned, b_up], dim=1) * _scale(parts, len(a2), settings)
    return up, torch.cat([torch.kron(a2, kernel), b_down])


def _scale(parts: Parts, rank: int, settings: dict[str, Any]) -> float:
    chosen = Settings(**settings)
    return chosen.strength * scale_of(parts, rank, chosen)


def _matrices(parts: Parts, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1 [i, r], a2 [r, i], b1 [o, r], b2 [r, i kh kw] of either orientation."""
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    a1, a2, b1, b2 = (parts[part] for part in _orientation(shapes, shape))
    b2 = unfolded(parts["bm"], b2) if "bm" in parts else b2
    return a1.flatten(1), a2.flatten(1), b1.flatten(1), b2.flatten(1)


def _orientation(shapes: Shapes, shape: Shape | None) -> tuple[str, str, str, str]:
    """Which parts are a1, a2, b1, b2 as the formula has them: in old files their partners."""
    is_new = shapes["a2"][0] == shapes["a1"][1] == shapes["b1"][1] == shapes["b2"][0]
    is_old = shapes["a1"][0] == shapes["a2"][1] == shapes["b2"][1] == shapes["b1"][0]
    if is_new and is_old:  # o = i, so that the larger dimension is i and the smaller one r, unless the weight tells
        channels = max(shapes["a1"][:2]) if shape is None else prod(shape[1:2])
        is_new = shapes["a1"][0] == channels
    return ("a2", "a1", "b2", "b1") if is_old and not is_new else REQUIRED
