"""OFT: rotate blocks of channels (Qiu et al. 2023, arXiv:2306.07280). Two forms that rotate different sides:

    blocks    [n, b, b], o = n b        W' = rescale * R^T W, on the output channels (LyCORIS' Diag-OFT, kohya)
              R = (I + Q) (I - Q)^-1, Q = B - B^T, limited by `constraint` (see `_rotation.py`)
    vectors   [n, b (b - 1) / 2], i kh kw = n b, or [1, ...] for the same rotation of every block
              W' = W R^T, on the input side (PEFT, OneTrainer); Q = upper triangle from the vectors, minus its transpose

    rescale   [o, 1, ...] optional, with `blocks`
    scaled    a marker, with `vectors`: Q is divided by 2 sqrt(b - 1) (OneTrainer)

With `vectors`, R is the Neumann series I + 2 Q + 2 Q^2 + ... + Q^(N - 1) of `neumann_terms` N, 5 for both writers
(arXiv:2506.19847). With N = 0, PEFT's other choice, it is (I - Q) (I + Q)^-1: the inverse of what the series tends to.
For convolutions OneTrainer has W' = W R, and PEFT W R^T (`rotates_input`).

delta = W' - W, and strength t is W + t delta: kohya's t R + (1 - t) I.
"""

from __future__ import annotations

from math import isqrt, prod, sqrt
from typing import TYPE_CHECKING, Any

from sdops.adapters._parts import (
    Facts,
    Parts,
    Settings,
    Shape,
    Shapes,
    check_names,
    check_weight,
    missing,
    needed,
    refused,
    unfit,
    working,
)
from sdops.adapters._rotation import cayley, check_rescale, rescaled, rotations
from sdops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ()
OPTIONAL = ("blocks", "vectors", "rescale", "constraint", "scaled")
NEEDS_WEIGHT = ("blocks", "vectors")


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    if "blocks" in shapes:
        return _check_blocks(shapes, shape)
    if "vectors" not in shapes:
        raise missing("blocks", shapes)
    for part in ("rescale", "constraint"):
        if part in shapes:
            raise refused(part, shapes[part], "it does not belong to `vectors`")
    own = shapes["vectors"]
    size = _block_size(own[-1]) if len(own) == 2 else None
    if size is None:
        raise refused("vectors", own, "its second dimension should be b (b - 1) / 2")
    if own[0] == 1:  # shared by all blocks
        if shape is not None and prod(shape[1:]) % size:
            raise unfit("vectors", own, shape)
        return Facts(None, None, None)
    return check_weight(Facts(None, None, own[0] * size), shape, "vectors", own)


def _check_blocks(shapes: Shapes, shape: Shape | None) -> Facts:
    blocks = shapes["blocks"]
    for part in ("vectors", "scaled"):
        if part in shapes:
            raise refused(part, shapes[part], "it does not belong to `blocks`")
    if len(blocks) != 3 or blocks[1] != blocks[2]:
        raise refused("blocks", blocks, "it should hold square blocks")
    rows = blocks[0] * blocks[1]
    check_rescale(shapes, rows)
    return check_weight(Facts(None, rows, None), shape, "blocks", blocks)


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """W' - W in the weight's shape.

    Raises:
        SdopsError: there is no weight.
    """
    parts, weight = working(parts, weight)
    weight = needed(weight, shape, "OFT")
    chosen = Settings(**settings)
    if "blocks" in parts:
        rotation = rotations(parts, shape[0], chosen)
        rows = weight.reshape(*rotation.shape[:2], -1)  # [n, b, i kh kw]
        return chosen.strength * rescaled(rotation.mT @ rows, weight, parts, shape)
    rotation = _input_rotations(parts, chosen)  # [n or 1, b, b]
    if len(shape) == 2 or chosen.rotates_input:
        rotation = rotation.mT
    columns = weight.reshape(shape[0], -1, 1, rotation.shape[-1])  # [o, n, 1, b]
    return chosen.strength * ((columns @ rotation).reshape(shape) - weight)


def _input_rotations(parts: Parts, settings: Settings) -> Tensor:
    """R [n, b, b] of the vectors."""
    import torch

    vectors = parts["vectors"]
    size = _block_size(vectors.shape[1]) or 0
    if "scaled" in parts:
        vectors = vectors / (2 * sqrt(size - 1))
    row, column = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(len(vectors), size, size)
    upper = upper.index_put((torch.arange(len(vectors), device=vectors.device)[:, None], row, column), vectors)
    skew = upper - upper.mT
    return _neumann(skew, settings.neumann_terms) if settings.neumann_terms else cayley(-skew)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2 Q + ... + 2 Q^(N - 2) + Q^(N - 1); 3 terms are the same as 4, as in PEFT."""
    import torch

    if terms < 3:
        raise UsageError(f"`neumann_terms` is {terms}", hint="give 0 for the exact transform, or 3 or more")
    power = skew
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device) + 2 * skew
    for _ in range(2, max(terms, 4) - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def _block_size(count: int) -> int | None:
    """The b for which there are b (b - 1) / 2 numbers above the diagonal."""
    size = (1 + isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count else None
