"""Renumber another model's hidden units so that they match, then go a share of the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdops.merges._assignment import Columns, Matrix, assign
from sdops.merges._units import Axis, Units, find_units

EXECUTION = "model"

Reader = Callable[[str], list[Tensor]]


@dataclass
class Matching:
    """How b is to be renumbered.

    Attributes:
        orders: Key -> for some of its dimensions, which index of b comes at each place.
        groups: How many groups of units were compared.
        moved: How many of them were renumbered.
    """

    orders: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    groups: int = 0
    moved: int = 0

    def __str__(self) -> str:
        if not self.groups:
            return "no hidden units that can be renumbered: the same as weighted-sum"
        if not self.moved:
            return f"all {self.groups} groups of hidden units match already: the same as weighted-sum"
        return f"{self.moved} of {self.groups} groups of hidden units renumbered"


def prepare(keys: Sequence[str], read: Reader) -> Matching:
    """Match the hidden units of b to those of a.

    For each group of units (see _units) the renumbering P that maximises the inner product of a and P b over all
    tensors in which the units occur, that is, minimises |a - P b|^2.
    """
    matching = Matching()
    for units in find_units(keys, lambda key: read(key)[0].shape):
        matching.groups += 1
        orders = _match(units, read)
        if all(np.array_equal(order, np.arange(len(order))) for order in orders):
            continue
        matching.moved += 1
        for part, order in zip(units.parts, orders, strict=True):
            for axis in part:
                matching.orders.setdefault(axis.key, []).append((axis.dim, _repeated(order, axis.copies)))
    return matching


def weight_matching(a: Tensor, b: Tensor, *, state: Matching, key: str, alpha: float = 0.5) -> Tensor:
    """a + alpha (P b - a),   P = the renumbering of hidden units that minimises |a - P b|^2.

    P b computes the same as b. Fine-tunes of one base need no renumbering (P is the identity and this is
    `weighted_sum`); it helps models that were trained apart. Renumbered are the inner units of feed-forward layers,
    of attention heads and of the UNet's residual blocks, for SD1, SD2 and SDXL in the original layout; the residual
    stream and the VAE are not.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin: Merging Models modulo Permutation Symmetries, 2022, weight
    matching.

    Args:
        alpha: Share of b.
    """
    for dim, order in state.orders.get(key, ()):
        b = b.index_select(dim, order.to(b.device))
    return torch.lerp(a, b, alpha)


def _match(units: Units, read: Reader) -> list[Columns]:
    """For each part, the index of b's unit that comes at each place."""
    likeness = [_likeness(part, read) for part in units.parts]
    if all(_identity_is_best(gains) for gains in likeness):
        return [np.arange(len(gains)) for gains in likeness]
    sizes = [len(gains) // units.blocks for gains in likeness]
    # inside[part][i][j]: the best renumbering between block i of a and block j of b, and total[i, j] its gain
    total = np.zeros((units.blocks, units.blocks))
    inside: list[list[list[Columns]]] = []
    for gains, size in zip(likeness, sizes, strict=True):
        inside.append([])
        for i in range(units.blocks):
            inside[-1].append([])
            for j in range(units.blocks):
                block = gains[i * size : (i + 1) * size, j * size : (j + 1) * size]
                columns = assign(block)
                inside[-1][i].append(columns)
                total[i, j] += block[np.arange(size), columns].sum()
    chosen = assign(total)
    return [
        np.concatenate([j * size + part[i][j] for i, j in enumerate(chosen)])
        for part, size in zip(inside, sizes, strict=True)
    ]


def _likeness(part: Sequence[Axis], read: Reader) -> Matrix:
    """Inner products of the units of a with those of b, (n, n), summed over all places where they occur."""
    total: Tensor | None = None
    for axis in part:
        a, b = (x.movedim(axis.dim, 0).flatten(1) if x.ndim > 1 else x[:, None] for x in read(axis.key))
        for x, y in zip(a.chunk(axis.copies), b.chunk(axis.copies), strict=True):
            total = torch.addmm(total, x, y.T) if total is not None else x @ y.T
    if total is None:
        return np.zeros((0, 0))
    return total.cpu().numpy()


def _identity_is_best(gains: Matrix) -> bool:
    """Whether each unit is most like the one with its own number: no renumbering can gain more."""
    return bool((gains.diagonal() >= gains.max(axis=1)).all())


def _repeated(order: Columns, copies: int) -> Tensor:
    """The order for a dimension that holds the units several times."""
    return torch.from_numpy(np.concatenate([order + copy * len(order) for copy in range(copies)]))
