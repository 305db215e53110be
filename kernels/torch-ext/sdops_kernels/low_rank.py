"""The best factors of many matrices at once: W [o, i] ~ up [o, r] @ down [r, i], batched by shape, in torch alone.

Block Krylov iteration (Musco and Musco 2015) from a random start: Q_1 spans X Omega, Q_j+1 what (X X^T) Q_j adds.
Blocks are made orthonormal by CholeskyQR2 (Yamamoto et al. 2015) with Gram matrices in float64: a few batched products
instead of a QR per matrix. A small eigenproblem in float64 finds the leading directions in what the blocks span. The
error is known afterwards: ||X - up down||^2 = ||X||^2 - sum of the squared singular values kept. It is at most 0.1 %
above the least possible one, if that is above 5e-5 ||X||.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._registration import register

__all__ = ["Factors", "low_rank", "singular_factors"]

MEMORY = 2 << 30  # bytes of a batch of matrices
MOST_BLOCKS = 8
ENOUGH = 5e-4  # of the squared error: what a block gains when no further one is worth while
OVERSAMPLED = 8


class Factors(NamedTuple):
    """A matrix as a product.

    Attributes:
        up: [o, r], float32; its column j and row j of `down` have norms within a factor of 2 of each other.
        down: [r, i].
        values: The leading singular values that were found, at least r, float64.
        energy: ||W||_F^2.
        residual: ||W - up @ down||_F^2, from the values.
    """

    up: Tensor
    down: Tensor
    values: Tensor
    energy: float
    residual: float


def low_rank(matrices: Sequence[Tensor], rank: int, *, seed: int = 0, memory: int = MEMORY) -> list[Factors]:
    """Factors of a rank of all matrices; those of equal shape share a batch.

    Products are made in float32; TF32 would lose the small singular values, so it is refused.

    Args:
        matrices: [o, i] each, of any shapes, on one device.
        rank: At most the shorter side is used.
        seed: Of the random start. A matrix's factors do not depend on what else is given but for the last bits.
        memory: Bytes that a batch may take.

    Raises:
        ValueError: torch is set to round float32 products to TF32.
    """
    if matrices and matrices[0].is_cuda and torch.backends.cuda.matmul.allow_tf32:
        raise ValueError("torch.backends.cuda.matmul.allow_tf32 is on; factors would be good to three digits only")
    shapes: dict[tuple[int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append(place)
    found: dict[int, Factors] = {}
    for shape, places in shapes.items():
        at_once = max(1, memory // (shape[0] * shape[1] * 4))
        for begin in range(0, len(places), at_once):
            batch = places[begin : begin + at_once]
            made = _batch(torch.stack([matrices[place].float() for place in batch]), rank, seed)
            found |= dict(zip(batch, made, strict=True))
    return [found[place] for place in range(len(matrices))]


def singular_factors(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Products up @ down in terms of their singular vectors: the leading columns and rows are the best approximations.

    up = Q_u R_u, down^T = Q_d R_d; the singular values of up @ down are those of R_u R_d^T. R_u and Q_u come out of the
    Gram matrix: up^T up = V S^2 V^T, so R_u = S V^T and Q_u = up V / S. The second factor is left^T R_u down, so that
    nothing that is kept is divided by a small number. All in float64, in batches of equal shapes.

    Args:
        ups: [o, R] each.
        downs: [R, i].

    Returns:
        [o, k] and [k, i], k = min(R, o, i), float64, descending: columns of the first and rows of the second are
        orthogonal, their norms within a factor of 2 of each other, and the norms' products are the singular values.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, (up, down) in enumerate(zip(ups, downs, strict=True)):
        shapes.setdefault((*up.shape, down.shape[1]), []).append(place)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in shapes.values():
        up, down = (torch.stack([parts[place].double() for place in places]) for parts in (ups, downs))
        found |= dict(zip(places, zip(*_singular(up, down), strict=True), strict=True))
    return [found[place] for place in range(len(ups))]


def _singular(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Those of [b, o, R] and [b, R, i]."""
    left, triangle = _orthogonal_part(up)
    _, other = _orthogonal_part(down.mT)
    core = triangle @ other.mT  # [b, R, R]
    squares, vectors = torch.linalg.eigh(core @ core.mT)
    kept = min(up.shape[1], up.shape[2], down.shape[2])
    vectors, values = vectors.flip(2)[:, :, :kept], squares.flip(1)[:, :kept].clamp(min=0).sqrt()
    scale = torch.exp2(values.clamp(min=1e-300).log2().div(2).round().clamp(-60, 60))
    first = up @ (left @ vectors) * scale[:, None]
    second = (vectors.mT @ triangle) @ down / scale[:, :, None]
    return first, second


def _orthogonal_part(columns: Tensor) -> tuple[Tensor, Tensor]:
    """M and R with columns = (columns M) R and columns M orthonormal, but for directions that are zero to 1e-7."""
    squares, vectors = torch.linalg.eigh(columns.mT @ columns)
    values = squares.clamp(min=0).sqrt()
    real = values > 1e-7 * values.amax(1, keepdim=True)
    inverse = torch.where(real, 1 / values.clamp(min=1e-300), 0)
    return vectors * inverse[:, None], vectors.mT * torch.where(real, values, 0)[:, :, None]


def _batch(matrices: Tensor, rank: int, seed: int) -> list[Factors]:
    """Factors of matrices of one shape, [b, o, i]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # [b, m, n], m <= n
    rank = min(rank, x.shape[1])
    energy = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).square()
    basis, images = _krylov(x, rank, energy, seed)
    values, vectors = _eigen(images)  # descending
    chosen = vectors[:, :, :rank].float()  # [b, k, r]
    roots = torch.exp2(values[:, :rank].clamp(min=1e-300).log2().div(2).round().clamp(-60, 60)).float()
    left = basis @ chosen * roots[:, None]  # [b, m, r]
    right = chosen.mT @ images / roots[:, :, None]  # [b, r, n]
    kept = values[:, :rank].square().sum(1)
    residual = (energy - kept).clamp(min=0).tolist()
    ups, downs = (right.mT, left.mT) if tall else (left, right)
    numbers = zip(energy.tolist(), residual, strict=True)
    parts = zip(ups, downs, values, numbers, strict=True)
    return [Factors(up.contiguous(), down.contiguous(), own, *both) for up, down, own, both in parts]


def _krylov(x: Tensor, rank: int, energy: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal Q [b, m, k] that spans the leading directions, and Q^T X [b, k, n]."""
    width = min(rank + max(OVERSAMPLED, rank // 8), x.shape[1])
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(x.shape[2], width, generator=random).to(x.device)
    block = orthonormal(x @ start)
    basis, image = block, block.mT @ x
    images, captured = image, torch.zeros_like(energy)
    for _ in range(MOST_BLOCKS):
        values, _ = _eigen(images)
        now = values[:, :rank].square().sum(1)
        error = (energy - now).clamp(min=0) + 1e-12 * energy  # the second term is rounding
        if basis.shape[2] == x.shape[1] or bool((now - captured <= ENOUGH * error).all()):
            break
        captured = now
        room = x.shape[1] - basis.shape[2]
        fresh = (x @ image.mT)[:, :, :room]
        for _ in range(2):
            fresh = orthonormal(fresh - basis @ (basis.mT @ fresh))
        image = fresh.mT @ x
        basis, images = torch.cat([basis, fresh], 2), torch.cat([images, image], 1)
    return basis, images


def orthonormal(columns: Tensor) -> Tensor:
    """CholeskyQR2: columns [b, m, l] times the inverse of the Cholesky factor of their Gram matrix, twice.

    The Gram matrix has the square of their condition number; float64 and a shift take that up to 1e7, and the second
    pass repairs what the first one leaves.
    """
    for _ in range(2):
        norms = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
        columns = columns / torch.where(norms > 0, norms, torch.ones_like(norms))
        wide = columns.double()
        gram = wide.mT @ wide
        shift = 1e-14 * gram.shape[-1] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        empty = torch.diag_embed((norms[:, 0] == 0).double())  # columns of zeros stay that
        factor = torch.linalg.cholesky(gram + shift + empty)
        columns = torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.float()
    return columns


def _eigen(images: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of Q^T X and its left singular vectors in columns, descending, float64: [b, k], [b, k, k]."""
    wide = images.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    return squares.flip(1).clamp(min=0).sqrt(), vectors.flip(2)


def _op(matrices: list[Tensor], rank: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    found = low_rank(matrices, rank, seed=seed)
    return [own.up for own in found], [own.down for own in found]


def _fake(matrices: list[Tensor], rank: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    del seed
    ups = [own.new_empty(len(own), min(rank, *own.shape), dtype=torch.float32) for own in matrices]
    downs = [own.new_empty(min(rank, *own.shape), own.shape[1], dtype=torch.float32) for own in matrices]
    return ups, downs


def _op_of_products(ups: list[Tensor], downs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    found = singular_factors(ups, downs)
    return [first.clone() for first, _ in found], [second.clone() for _, second in found]  # not views of batches


def _fake_of_products(ups: list[Tensor], downs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    ranks = [min(*up.shape, down.shape[1]) for up, down in zip(ups, downs, strict=True)]
    firsts = [up.new_empty(len(up), rank, dtype=torch.float64) for up, rank in zip(ups, ranks, strict=True)]
    seconds = [
        down.new_empty(rank, down.shape[1], dtype=torch.float64) for down, rank in zip(downs, ranks, strict=True)
    ]
    return firsts, seconds


register("low_rank", "(Tensor[] matrices, int rank, int seed) -> (Tensor[], Tensor[])", _op, _fake)
register(
    "singular_factors", "(Tensor[] ups, Tensor[] downs) -> (Tensor[], Tensor[])", _op_of_products, _fake_of_products
)
