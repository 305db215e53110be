"""Ways to merge the changes that several LoRAs make to one layer. None builds a dense matrix where all are factors.

With D_i = w_i up_i down_i, the change of the i-th LoRA times its weight:

    concat       sum_i D_i: factors side by side. Exact
    svd          the same, cut to the rank that was asked for: the best approximation of that rank
    ties         TIES (Yadav et al. 2023, arXiv:2306.01708) on the cores: each keeps its largest numbers, signs are
                 elected, those that agree are averaged
    dare         DARE (Yu et al. 2023, arXiv:2311.03099) on the cores: numbers are dropped at random, the others grow
    knots        KnOTS (Stoica et al. 2024, arXiv:2410.19735): TIES on the right factors V_i of the common decomposition
                 [D_1 ... D_k] = U S [V_1 ... V_k]^T; the result is U S V^T
    orthogonal   every LoRA acts only on inputs that those before it do not react to:
                 D_1 + D_2 (I - P_1) + D_3 (I - P_12) + ..., P = projection on the row space of the earlier D.
                 So D x = D_1 x for all x in the row space of D_1

A core is D_i in the common bases of all: M_i = U^T D_i V, with U the left singular vectors of [D_1 ... D_k] and V the
right ones of [D_1; ...; D_k], at most (sum of ranks)^2 numbers, and D_i = U M_i V^T exactly. So choices by magnitude
are made per direction, not per weight. Dense changes are merged element by element, and biases added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdops.core.lowrank import generator
from sdops.core.patch import Target
from sdops.verbs._adapter_changes import NOTHING, Change, joined, spread

Pair = tuple[Tensor, Tensor]  # up [o, r], down [r, n]


class Knobs(NamedTuple):
    """Of `ties`, `dare` and `knots`.

    Attributes:
        density: Share of the numbers that is kept.
        seed: Of `dare`; with the layer's name it determines what is dropped.
    """

    density: float = 0.5
    seed: int = 0


def merged(method: str, target: Target, changes: Sequence[Change], knobs: Knobs) -> Change:
    """The changes of one layer as one.

    Args:
        method: One of the above; `svd` is `concat` here, for the caller cuts the rank.
        target: The layer, or the rows that the result speaks of.
        changes: Times their weights.
        knobs: Of the method.
    """
    whole = joined(target, changes)
    if method in ("concat", "svd") or (whole.dense is None and whole.up is None):
        return whole
    if whole.dense is not None:
        if method == "orthogonal":
            return whole
        parts = torch.stack([spread(change, target).matrix.double() for change in changes])
        numbers = dare(parts, knobs, str(target)) if method == "dare" else ties(parts, knobs.density)
        return Change(target, whole.shape, dense=numbers.reshape(whole.shape), bias=whole.bias)
    pairs = [(up.double(), down.double()) for up, down in (spread(change, target).factors for change in changes)]
    up, down = _PRODUCTS[method](pairs, knobs, str(target))
    return Change(target, whole.shape, up, down, bias=whole.bias)


def ties(values: Tensor, density: float) -> Tensor:
    """Trim, elect, average. Values [k, ...] of k models -> [...].

    Of each model the largest `density` of the numbers by magnitude are kept; the sign of an element is that of the sum
    (0 counts as +); the result is the mean of the numbers that are kept and have that sign, 0 if there are none.
    """
    kept = values * _largest(values, density)
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agreeing = (kept * elected > 0).to(values.dtype)
    return (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def dare(values: Tensor, knobs: Knobs, name: str) -> Tensor:
    """Every number stays with probability `density`, divided by it, or becomes 0. Values [k, ...] -> sum [...]."""
    chance = torch.rand(values.shape, generator=generator(knobs.seed, name), dtype=values.dtype)
    return (values * (chance < knobs.density).to(values.device)).sum(0) / max(knobs.density, 1e-12)


def _largest(values: Tensor, density: float) -> Tensor:
    """Which numbers of each model are among its largest; at least one."""
    flat = values.flatten(1).abs()
    count = max(round(density * flat.shape[1]), 1)
    order = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(flat).scatter_(1, order, 1.0).reshape(values.shape)


# -------------------------------------------------------------------------------------------------- joint decomposition


class Joint(NamedTuple):
    """Changes in common bases.

    Attributes:
        left: [o, a], orthonormal.
        cores: [k, a, b]; change i is left @ cores[i] @ right.
        right: [b, n], orthonormal rows.
    """

    left: Tensor
    cores: Tensor
    right: Tensor


def joint(pairs: Sequence[Pair]) -> Joint:
    """The singular directions of all changes together, and each change in terms of them."""
    ranks = [up.shape[1] for up, _ in pairs]
    q_up, r_up = torch.linalg.qr(torch.cat([up for up, _ in pairs], dim=1))
    q_down, r_down = torch.linalg.qr(torch.cat([down for _, down in pairs]).T)
    ups, downs = r_up.split(ranks, dim=1), r_down.split(ranks, dim=1)
    cores = [up @ down.T for up, down in zip(ups, downs, strict=True)]  # in the bases of the factors
    left = _directions(torch.cat(cores, dim=1))
    right = _directions(torch.cat([core.T for core in cores], dim=1))
    return Joint(q_up @ left, torch.stack([left.T @ core @ right for core in cores]), right.T @ q_down.T)


def _directions(matrix: Tensor) -> Tensor:
    """The left singular vectors whose values are not zero, each with its largest number positive."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = left[:, values > NOTHING * values[0]]
    largest = kept.gather(0, kept.abs().argmax(0, keepdim=True))
    return kept * torch.where(largest < 0, -1.0, 1.0)


def _ties(pairs: Sequence[Pair], knobs: Knobs, _name: str) -> Pair:
    found = joint(pairs)
    return found.left, ties(found.cores, knobs.density) @ found.right


def _dare(pairs: Sequence[Pair], knobs: Knobs, name: str) -> Pair:
    found = joint(pairs)
    return found.left, dare(found.cores, knobs, name) @ found.right


def _knots(pairs: Sequence[Pair], knobs: Knobs, _name: str) -> Pair:
    """With D_i = left M_i right, U S V_i^T = left (M_i right), row j of which is s_j V_ij."""
    found = joint(pairs)
    scaled = found.cores @ found.right  # [k, a, n]: S V_i^T
    values = scaled.square().sum((0, 2)).sqrt()  # the singular values of [D_1 ... D_k]
    return found.left * values, ties(scaled / values[:, None], knobs.density)


def _orthogonal(pairs: Sequence[Pair], _knobs: Knobs, _name: str) -> Pair:
    ups, downs = [pairs[0][0]], [pairs[0][1]]
    basis = row_space(*pairs[0])
    for up, down in pairs[1:]:
        left = down - (down @ basis) @ basis.T
        if torch.linalg.norm(left) <= NOTHING * torch.linalg.norm(down):
            continue  # nothing but rounding
        ups.append(up)
        downs.append(left)
        basis = torch.linalg.qr(torch.cat([basis, row_space(up, left)], dim=1)).Q
    return torch.cat(ups, dim=1), torch.cat(downs)


def row_space(up: Tensor, down: Tensor) -> Tensor:
    """An orthonormal basis [n, r] of the inputs that up @ down reacts to."""
    q_down, r_down = torch.linalg.qr(down.T)
    triangle = torch.linalg.qr(up, mode="r").R
    basis: Tensor = q_down @ _directions(r_down @ triangle.T)
    return basis


_PRODUCTS = {"ties": _ties, "dare": _dare, "knots": _knots, "orthogonal": _orthogonal}
