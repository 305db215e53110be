"""LoHa: the elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS).

    delta = s (w1_a w1_b) * (w2_a w2_b)

    w1_a, w2_a   [o, r];              Tucker: [r, o]
    w1_b, w2_b   [r, i kh kw];        Tucker: [r, i]
    t1, t2       Tucker only: [r, r, kh, kw], matrix_l[o, i, k] = sum_mn t_l[m, n, k] w_l_a[m, o] w_l_b[n, i]

A product of sums is a sum of products, so the change is a LoRA of rank r^2 (`factors`).
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

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("w1_a", "w1_b", "w2_a", "w2_b")
OPTIONAL = ("t1", "t2", "lora_alpha", *_dora.PARTS)
NEEDS_WEIGHT = _dora.PARTS


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    for part in REQUIRED:
        if len(shapes[part]) != 2:
            raise refused(part, shapes[part], "it should be a matrix")
    rank, columns = shapes["w1_b"]
    is_tucker = "t1" in shapes or "t2" in shapes
    rows = shapes["w1_a"][1 if is_tucker else 0]
    kernel: Shape = ()
    if is_tucker:
        for part in ("t1", "t2"):
            if part not in shapes:
                raise missing(part, shapes)
        kernel = shapes["t1"][2:]
    for side in ("1", "2"):
        inner = shapes[f"w{side}_b"][0]
        check_shape(f"w{side}_a", shapes[f"w{side}_a"], (inner, rows) if is_tucker else (rows, inner))
        check_shape(f"w{side}_b", shapes[f"w{side}_b"], (inner, columns))
        if is_tucker:
            check_shape(f"t{side}", shapes[f"t{side}"], (inner, inner, *kernel))
    if is_tucker:
        check_kernel("t1", (rank, columns, *kernel), shape)
    _dora.check(shapes, rows, shape)
    facts = Facts(rank, rows, columns * prod(kernel))
    wrong = "w1_a" if shape is not None and shape[0] != rows else "w1_b"
    return check_weight(facts, shape, wrong, shapes[wrong])


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape; with a magnitude that of DoRA, which needs the weight."""
    parts, weight = working(parts, weight)
    chosen = Settings(**settings)
    (up1, down1), (up2, down2) = _pair(parts, "1"), _pair(parts, "2")
    scale = scale_of(parts, len(parts["w1_b"]), chosen)
    return _dora.applied(((up1 * scale) @ down1 * (up2 @ down2)).reshape(shape), parts, weight, chosen)


def factors(
    parts: Parts, _shape: Shape, _weight: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor] | None:
    """Up [o, r^2], down [r^2, i kh kw]: columns and rows of the two matrices multiplied in all pairs; None for DoRA."""
    if any(part in parts for part in _dora.PARTS):
        return None
    parts, _ = working(parts)
    chosen = Settings(**settings)
    (up1, down1), (up2, down2) = _pair(parts, "1"), _pair(parts, "2")
    scale = chosen.strength * scale_of(parts, len(parts["w1_b"]), chosen)
    up = (up1 * scale).unsqueeze(2) * up2.unsqueeze(1)  # [o, r, r]
    down = down1.unsqueeze(1) * down2.unsqueeze(0)  # [r, r, i kh kw]
    return up.flatten(1), down.flatten(0, 1)


def _pair(parts: Parts, side: str) -> tuple[Tensor, Tensor]:
    """One of the two matrices as up [o, r], down [r, i kh kw]."""
    up, down = parts[f"w{side}_a"], parts[f"w{side}_b"]
    if f"t{side}" not in parts:
        return up, down
    return up.T, unfolded(parts[f"t{side}"], down).flatten(1)
