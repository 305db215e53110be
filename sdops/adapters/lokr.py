"""LoKr: a Kronecker product (KronA, Edalati et al. 2022, arXiv:2212.10650; LyCORIS), with o = a b and i = c d.

    delta = s w1 (x) w2

    w1   [a, c], or w1_a [a, r], w1_b [r, c]
    w2   [b, d] or [b, d, kh, kw], or w2_a [b, r], w2_b [r, d] or [r, d kh kw]
         Tucker: t2 [r, r, kh, kw], w2_a [r, b], w2_b [r, d], w2[b, d, k] = sum_mn t2[m, n, k] w2_a[m, b] w2_b[n, d]

Kernels are flattened into the columns of w2 and the product of matrices is reshaped to the weight: this is also right
for the first LyCORIS files (spring 2023), which divided i kh kw, not i, into c d.

s = alpha / r if w1 or w2 is factored, otherwise 1 whatever alpha says; PEFT scales full ones as well (`rank`).

The singular values of w1 (x) w2 are the products of those of w1 and w2, and so are its vectors; that gives the optimal
LoRA of any rank from two small decompositions (`fit`).
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

REQUIRED = ()
OPTIONAL = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "lora_alpha", *_dora.PARTS)
NEEDS_WEIGHT = _dora.PARTS


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the weight's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the weight.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    a, c, rank1 = _check_side(shapes, "1")
    b, d, rank2 = _check_side(shapes, "2")
    rows, columns = a * b, c * d
    _dora.check(shapes, rows, shape)
    last = "w2" if "w2" in shapes else "w2_b"
    return check_weight(Facts(rank2 or rank1, rows, columns), shape, last, shapes[last])


def _check_side(shapes: Shapes, side: str) -> tuple[int, int, int | None]:
    """Rows, columns with the kernel, and rank of w1 or w2."""
    full, first, second, core = f"w{side}", f"w{side}_a", f"w{side}_b", f"t{side}"
    if full in shapes:
        if first in shapes or second in shapes:
            raise refused(full, shapes[full], "it is there both whole and factored")
        if len(shapes[full]) < 2:
            raise refused(full, shapes[full], "it should have two or more dimensions")
        return shapes[full][0], prod(shapes[full][1:]), None
    for part in (first, second):
        if part not in shapes:
            raise missing(part if second in shapes or first in shapes else full, shapes)
        if len(shapes[part]) < 2:
            raise refused(part, shapes[part], "it should have two or more dimensions")
    rank, columns = shapes[second][0], prod(shapes[second][1:])
    if core not in shapes:
        check_shape(first, shapes[first], (shapes[first][0], rank))
        return shapes[first][0], columns, rank
    kernel = shapes[core][2:]
    check_shape(core, shapes[core], (shapes[first][0], rank, *kernel))
    return prod(shapes[first][1:]), columns * prod(kernel), rank


def delta(parts: Parts, shape: Shape, weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the weight's shape; with a magnitude that of DoRA, which needs the weight."""
    parts, weight = working(parts, weight)
    chosen = Settings(**settings)
    w1, w2 = _matrix(parts, "1"), _matrix(parts, "2")
    product = _kron(w1 * _scale(parts, chosen), w2)  # [o, i kh kw]
    return _dora.applied(product.reshape(shape), parts, weight, chosen)


def factors(
    parts: Parts, _shape: Shape, _weight: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor] | None:
    """(up1 down1) (x) (up2 down2) = (up1 (x) up2) (down1 (x) down2), where a full w is w times the identity."""
    if any(part in parts for part in _dora.PARTS):
        return None
    parts, _ = working(parts)
    chosen = Settings(**settings)
    (up1, down1), (up2, down2) = _pair(parts, "1"), _pair(parts, "2")
    return _kron(up1 * (_scale(parts, chosen) * chosen.strength), up2), _kron(down1, down2)


def fit(parts: Parts, _shape: Shape, rank: int, /, **settings: Any) -> tuple[Tensor, Tensor, float] | None:
    """The best LoRA of a rank: up [o, R], down [R, i kh kw], and the share of the squared norm that it keeps.

    The `rank` largest products of singular values are taken, fewer if there are fewer, and their roots put on both
    sides. None for DoRA.
    """
    import torch

    if any(part in parts for part in _dora.PARTS):
        return None
    floats, _ = working(parts)
    chosen = Settings(**settings)
    u1, s1, v1 = torch.linalg.svd(_matrix(floats, "1").double() * _scale(parts, chosen), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(_matrix(floats, "2").double(), full_matrices=False)
    products = torch.outer(s1, s2).flatten()
    kept, order = products.topk(min(rank, len(products)))
    first, second = order // len(s2), order % len(s2)
    roots = kept.sqrt()
    up = (u1[:, first].unsqueeze(1) * u2[:, second].unsqueeze(0)).flatten(0, 1) * roots  # [a b, R]
    down = (v1[first].unsqueeze(2) * v2[second].unsqueeze(1)).flatten(1) * roots.unsqueeze(1)  # [R, c d kh kw]
    total = products.square().sum()
    captured = float(kept.square().sum() / total) if total > 0 else 1.0
    dtype = next(part.dtype for name, part in floats.items() if name.startswith("w"))
    return (up * chosen.strength).to(dtype), down.to(dtype), captured


def _scale(parts: Parts, settings: Settings) -> float:
    factored = [parts[part] for part in ("w2_b", "w1_b") if part in parts]
    if factored:
        return scale_of(parts, len(factored[0]), settings)
    return 1.0 if settings.rank is None else scale_of(parts, settings.rank, settings)


def _matrix(parts: Parts, side: str) -> Tensor:
    """w1 or w2 as a matrix, kernels in its columns."""
    if f"w{side}" in parts:
        return parts[f"w{side}"].flatten(1)
    up, down = _pair(parts, side)
    return up @ down


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """left (x) right of two matrices; torch.kron refuses some transposed ones."""
    product = left[:, None, :, None] * right[None, :, None, :]
    return product.flatten(2).flatten(0, 1)


def _pair(parts: Parts, side: str) -> tuple[Tensor, Tensor]:
    """w1 or w2 as a product of two matrices with the smallest inner dimension that their form allows."""
    import torch

    if f"w{side}" in parts:
        matrix = parts[f"w{side}"].flatten(1)
        identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, identity)
    up, down = parts[f"w{side}_a"], parts[f"w{side}_b"]
    if f"t{side}" in parts:
        return up.flatten(1).T, unfolded(parts[f"t{side}"], down).flatten(1)
    return up.flatten(1), down.flatten(1)
