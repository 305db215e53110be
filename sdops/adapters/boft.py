"""BOFT: a product of block rotations in butterfly order (Liu et al. 2023, arXiv:2311.06243), as LyCORIS writes it.

    W' = rescale * B_m ... B_2 B_1 W

    blocks    [m, n, b, b], o = n b: m stages of n rotations R = (I + Q) (I - Q)^-1, Q = B - B^T
    rescale   [o, 1, ...] optional

Stage s (from 0) rotates groups of b output channels: in each run of 2^s b channels, those that are 2^s b / 2 apart are
paired, and b / 2 neighbouring pairs make a block. Strength t is W + t delta; LyCORIS blends every stage instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdops.adapters._parts import (
    Facts,
    Parts,
    Settings,
    Shape,
    Shapes,
    check_names,
    check_weight,
    needed,
    refused,
    working,
)
from sdops.adapters._rotation import check_rescale, rescaled, rotations

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("blocks",)
OPTIONAL = ("rescale", "constraint")
NEEDS_WEIGHT = REQUIRED


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    blocks = shapes["blocks"]
    if len(blocks) != 4 or blocks[2] != blocks[3] or blocks[2] % 2:
        raise refused("blocks", blocks, "it should hold stages of square blocks of even size")
    stages, count, size, _ = blocks
    if count % 2 ** (stages - 1):
        raise refused("blocks", blocks, f"{count} blocks cannot be mixed in {stages} stages")
    check_rescale(shapes, count * size)
    return check_weight(Facts(None, count * size, None), shape, "blocks", blocks)


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """W' - W in the weight's shape.

    Raises:
        SdopsError: there is no weight.
    """
    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "BOFT")
    chosen = Settings(**settings)
    rotated = weight.reshape(len(weight), -1)  # [o, i kh kw]
    for stage, rotation in enumerate(rotations(parts, shape[0], chosen)):
        count, size, _ = rotation.shape
        half = 2**stage * size // 2
        # Bring the pairs (j, j + half) of each run together, rotate blocks of b rows, and take them back.
        paired = rotated.reshape(-1, 2, half, rotated.shape[1]).transpose(1, 2).reshape(count, size, -1)
        turned = (rotation @ paired).reshape(-1, half, 2, rotated.shape[1])
        rotated = turned.transpose(1, 2).reshape(rotated.shape)
    return chosen.strength * rescaled(rotated, weight, parts, shape)
