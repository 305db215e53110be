"""The rotation that brings the rows of one matrix nearest to those of another, and its fractional powers. float64."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Q with U^T Q = V^T for orthonormal columns U, V (p, k); k < p leaves Q open outside their span.

    Attributes:
        u: Directions before, (p, k), by descending importance.
        v: The same directions after.
    """

    u: Tensor
    v: Tensor

    @classmethod
    def between(cls, a: Tensor, b: Tensor) -> Rotation:
        """The Q that minimises |a Q - b| for matrices (n, p)."""
        rows, columns = a.shape
        if rows >= columns:
            u, _, vh = torch.linalg.svd(a.T @ b)
            return cls(u, vh.T)
        # a^T b has rank n at most: decompose its n x n core between orthonormal bases of both row spaces
        basis_a, core_a = torch.linalg.qr(a.T)
        basis_b, core_b = torch.linalg.qr(b.T)
        u, _, vh = torch.linalg.svd(core_a @ core_b.T)
        return cls(basis_a @ u, basis_b @ vh.T)

    def undo(self, y: Tensor) -> Tensor:
        """Y Q^-1 for rows in the span of V."""
        return (y @ self.v) @ self.u.T

    def apply(self, x: Tensor, power: float) -> Tensor:
        """X Q^power, power from 0 to 1, for rows in the span of U."""
        if power == 0:
            return x
        if power == 1:
            return (x @ self.u) @ self.v.T
        if self.u.shape[0] == self.u.shape[1]:
            return x @ fractional_power(_without_reflection(self.u, self.v), power)
        # Q turns the span of U and V into itself and may leave everything outside it alone
        span = torch.linalg.qr(torch.cat([self.u, self.v], dim=1)).Q
        u, v = _completed(span.T @ self.u), _completed(span.T @ self.v)
        rank = self.u.shape[1]
        outside_u, outside_v = u[:, rank:], v[:, rank:]
        left, _, right = torch.linalg.svd(outside_u.T @ outside_v)  # the map between the rests nearest to the identity
        u = torch.cat([outside_u @ left @ right, u[:, :rank]], dim=1)
        v = torch.cat([outside_v, v[:, :rank]], dim=1)
        turned: Tensor = x @ span @ fractional_power(_without_reflection(u, v), power) @ span.T
        return turned


def _without_reflection(u: Tensor, v: Tensor) -> Tensor:
    """U V^T, its last direction turned round if it would mirror."""
    product = u @ v.T
    if torch.linalg.slogdet(product).sign < 0:
        product = product - 2 * u[:, -1:] @ v[:, -1:].T
    return product


def _completed(x: Tensor) -> Tensor:
    """An orthogonal matrix (p, p) that begins with the orthonormal columns x (p, k)."""
    rest = torch.linalg.qr(x, mode="complete").Q[:, x.shape[1] :]
    return torch.cat([x, rest], dim=1)


def fractional_power(q: Tensor, power: float) -> Tensor:
    """Q^power of a rotation: every angle multiplied by `power`.

    With a complex number c on the unit circle, i (Q - c) (Q + c)^-1 is Hermitian, and tells all angles apart. c lies
    opposite to the widest gap between the angles of Q, so that Q + c is well conditioned.
    """
    cosines = torch.linalg.eigvalsh((q + q.T) / 2).clamp(-1, 1)
    angles = torch.cat([cosines.acos(), -cosines.acos()]).sort().values
    gaps = torch.cat([angles[1:], angles[:1] + 2 * pi]) - angles
    widest = int(gaps.argmax())
    c = torch.polar(torch.tensor(1.0, dtype=q.dtype), angles[widest] + gaps[widest] / 2 + pi)
    one = torch.eye(len(q), dtype=c.dtype)
    cayley = torch.linalg.solve(q + c * one, q - c * one) * 1j
    vectors = torch.linalg.eigh((cayley + cayley.mH) / 2).eigenvectors
    values = (vectors.conj() * (q.to(c.dtype) @ vectors)).sum(0)
    powers = torch.polar(torch.ones_like(values.real), power * values.angle())
    result: Tensor = ((vectors * powers) @ vectors.mH).real
    return result
