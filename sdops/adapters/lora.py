"""LoRA (Hu et al. 2021, arXiv:2106.09685), LoCon, and their Tucker form; also DyLoRA and Control-LoRA files.

    delta = s up down,   s = alpha / r, alpha / sqrt(r) under rsLoRA, 1 without an alpha

    up          [o, r] or [o, r, 1, 1]
    down        [r, i], [r, i, kh, kw], or [r, i kh kw] (flattened)
    mid         [r, r, kh, kw] with down [r, i, 1, 1]: delta[o, i, k] = s sum_mn up[o, m] mid[m, n, k] down[n, i]
    up_bias     [o]: the bias changes by s up_bias (BFL's control LoRAs)
    reshape     the shape to which the base weight is zero-padded first (ComfyUI); the caller passes it as `shape`
    sparse_*    what LyCORIS' extraction may keep of the rest: `indices` [2, n] and `values` [n] of a matrix of `size`
                [2] = [o, i kh kw], added to up down; saved as int16, so that indices above 32767 come as negative ones

DyLoRA trains so that the first ranks alone are a LoRA too; `rank` selects them, and alpha is then divided by that
number, as kohya's splitter does. DoRA: see `_dora.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from sdops.adapters import _dora
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
    missing,
    refused,
    scale_of,
    unfolded,
    working,
)
from sdops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("up", "down")
SPARSE = ("sparse_indices", "sparse_values", "sparse_size")
OPTIONAL = ("mid", "lora_alpha", *_dora.PARTS, "up_bias", "reshape", *SPARSE)
NEEDS_WEIGHT = _dora.PARTS


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
    for part in ("up", "down"):
        if len(shapes[part]) < 2:
            raise refused(part, shapes[part], "it should have two or more dimensions")
    rank, rows, columns = down[0], up[0], prod(down[1:])
    if mid is None:
        check_shape("up", up, (rows, rank))
        check_kernel("down", down, shape)
    else:
        if len(mid) < 3:
            raise refused("mid", mid, "it should have a kernel")
        check_shape("up", up, (rows, mid[0]))
        check_shape("down", down, (mid[1], down[1]))
        columns = down[1] * prod(mid[2:])
        check_kernel("mid", (rank, down[1], *mid[2:]), shape)
    if "up_bias" in shapes:
        check_shape("up_bias", shapes["up_bias"], (rows,))
    _check_sparse(shapes)
    _dora.check(shapes, rows, shape)
    facts = Facts(rank, rows, columns, bias="up_bias" in shapes)
    wrong = "up" if shape is not None and shape[0] != rows else "down"
    return check_weight(facts, shape, wrong, shapes[wrong])


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape; with a magnitude that of DoRA, which needs the weight."""
    parts, weight = working(parts, weight)
    up, down = _product(parts, Settings(**settings))
    change = up @ down
    if "sparse_values" in parts:
        scale = scale_of(parts, _rank(parts, Settings(**settings)), Settings(**settings))
        change = change + scale * _sparse(parts, (len(up), down.shape[1]))
    return _dora.applied(change.reshape(shape), parts, weight, Settings(**settings))


def factors(
    parts: Parts, _shape: Shape, _weight: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor] | None:
    """Up [o, r] with the scale, down [r, i kh kw]; None for DoRA and with sparse numbers beside."""
    if any(part in parts for part in (*_dora.PARTS, *SPARSE)):
        return None
    up, down = _product(working(parts)[0], Settings(**settings))
    return up * Settings(**settings).strength, down


def bias_delta(parts: Parts, _shape: Shape, _bias: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The change of the bias, [o]."""
    if "up_bias" not in parts:
        return None
    floats, _ = working(parts)
    chosen = Settings(**settings)
    return floats["up_bias"].reshape(-1) * (chosen.strength * scale_of(parts, _rank(parts, chosen), chosen))


def _check_sparse(shapes: Shapes) -> None:
    found = [part for part in SPARSE if part in shapes]
    if not found:
        return
    for part in SPARSE:
        if part not in shapes:
            raise missing(part, shapes)
    indices, values, size = (shapes[part] for part in SPARSE)
    if len(indices) != 2 or indices[0] != 2:
        raise refused("sparse_indices", indices, "it should be [2, n]: a row and a column for every number")
    check_shape("sparse_values", values, indices[1:])
    check_shape("sparse_size", size, (2,))


def _sparse(parts: Parts, matrix: tuple[int, int]) -> Tensor:
    """The single numbers as a matrix [o, i kh kw].

    Raises:
        FormatError: they are for a matrix of another size.
    """
    indices, size = ((parts[part].round().long() % (1 << 16)) for part in ("sparse_indices", "sparse_size"))
    if tuple(size.tolist()) != matrix or bool((indices >= size[:, None]).any()):
        raise refused("sparse_size", tuple(size.tolist()), f"the other parts make a matrix of {list(matrix)}")
    found = parts["sparse_values"].new_zeros(matrix)
    return found.index_put((indices[0], indices[1]), parts["sparse_values"].reshape(-1), accumulate=True)


def _product(parts: Parts, settings: Settings) -> tuple[Tensor, Tensor]:
    """Scaled up [o, r] and plain down [r, i kh kw]."""
    up, down = parts["up"].flatten(1), parts["down"]
    rank = _rank(parts, settings)
    if "mid" in parts:
        down = unfolded(parts["mid"], down)
    elif rank < len(down):
        up, down = up[:, :rank], down[:rank]
    return up * scale_of(parts, rank, settings), down.flatten(1)


def _rank(parts: Parts, settings: Settings) -> int:
    available = len(parts["down"])
    if settings.rank is None:
        return available
    if not 0 < settings.rank <= available or "mid" in parts:
        raise UsageError(
            f"`rank` {settings.rank} is not among the {available} ranks of the LoRA",
            hint="`sdops inspect FILE` shows the ranks; a Tucker LoRA has no first ranks",
        )
    return settings.rank
