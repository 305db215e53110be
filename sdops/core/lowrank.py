"""Low-rank approximation of matrices: W [o, i] ~ up [o, r] @ down [r, i].

Three engines find the leading singular directions:

    exact    QR, then LAPACK's gesdd on the square factor, in float64
    gram     eigenvectors of the smaller of W W^T and W^T W in float64: all values, half of the time or less
    krylov   block Krylov iteration (Musco and Musco 2015): the leading directions alone, a small part of the time

and one (`of_product`) takes a matrix that is given as a product already: exact, and never builds it.

All use the projection form: with an orthonormal basis U [m, r] of the leading directions, W ~ U (U^T W). Nothing is
divided by a singular value, so small ones do no harm. The factors are then balanced by powers of two, which loses
nothing, and nothing is clamped.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdops.core.ranks import Rule, Spectrum

Engine = Literal["auto", "exact", "gram", "krylov"]

ENGINES: tuple[Engine, ...] = ("auto", "exact", "gram", "krylov")

CONVERGED = (
    2e-3  # of the squared error: what one more iteration may gain; the error is then within 0.1 % of the optimum
)
MOST_BLOCKS = 8
RUN = 1 << 14  # elements whose squares are summed in float32; the sum is good to 6 digits
CHUNK = 1 << 20  # elements that are looked at together where a whole copy of the matrix would be needed otherwise


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix as a product.

    Attributes:
        up: [o, r], balanced: its column j and row j of `down` have norms within a factor of 2 of each other.
        down: [r, i].
        spectrum: The singular values that were found, at least the r that are kept, and the energy ||W||_F^2.
    """

    up: Tensor
    down: Tensor
    spectrum: Spectrum

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]


def decompose(
    matrix: Tensor, rule: Rule, *, engine: Engine = "auto", guess: int = 32, seed: int = 0, name: str = ""
) -> Factors:
    """The best approximation of a matrix, of the rank that a rule chooses.

    `auto` takes krylov while the rank is small beside the shorter side, else gram. The error is at most 0.1 % above the
    least possible one, sqrt(sum_{i>r} s_i^2) (Eckart and Young), if that is above 1e-5 ||W||_F in float32.

    Args:
        matrix: [o, i], float32 or float64; the work is done in its dtype, in float64 where the engine says so.
        rule: Chooses the rank, see core.ranks.
        engine: See above.
        guess: The rank that is expected; a wrong one costs time.
        seed: Of the random start of krylov.
        name: Of the matrix; with the seed it determines the random numbers, so results do not depend on the order.

    Returns:
        Factors in the matrix's dtype.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # [m, n], m <= n
    total = squared_norm(matrix)
    if total == 0:
        basis, rest, spectrum = x[:, :0], x[:0], Spectrum(x.new_zeros(0, dtype=torch.float64), 0.0, _shape(matrix))
    elif engine == "exact":
        basis, rest, spectrum = _exact(x, rule, total)
    elif engine == "gram":
        basis, rest, spectrum = _gram(x, rule, total)
    else:
        basis, rest, spectrum = _krylov(x, rule, total, guess, generator(seed, name), patient=engine == "krylov")
    scale = _balance(spectrum.values[: basis.shape[1]]).to(matrix.dtype)
    basis, rest = basis * scale, rest / scale[:, None]
    return Factors(rest.T, basis.T, spectrum) if tall else Factors(basis, rest, spectrum)


def of_product(up: Tensor, down: Tensor, rule: Rule) -> Factors:
    """The best approximation of `up @ down`, exact, from a matrix of the size of the rank alone.

    up = Q_u R_u, down^T = Q_d R_d; the singular values of up @ down are those of R_u R_d^T. Worked out in float64.

    Args:
        up: [o, R].
        down: [R, i].
        rule: Chooses the rank.

    Returns:
        Factors in the dtype of `up`.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.T.double())
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    short = min(up.shape[0], down.shape[1])
    known = torch.nn.functional.pad(values, (0, short - len(values)))  # the others are zero
    spectrum = Spectrum(known, float(values.square().sum()), (up.shape[0], down.shape[1]))
    rank = min(_decided(rule, spectrum), len(values))
    scale = _balance(values[:rank])
    basis = q_up @ left[:, :rank] * scale  # [o, r]
    rest = (values[:rank] / scale)[:, None] * right[:rank] @ q_down.T  # [r, i]
    return Factors(basis.to(up.dtype), rest.to(up.dtype), spectrum)


def residual(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    """||W - up @ down||_F^2, measured: the difference in the matrix's dtype, its square summed in float64.

    Args:
        matrix: [o, i].
        up: [o, r].
        down: [r, i].
    """
    up, down = up.to(matrix.dtype), down.to(matrix.dtype)
    rows = max(CHUNK // matrix.shape[1], 1)
    total = 0.0
    for begin in range(0, matrix.shape[0], rows):
        total += squared_norm(torch.addmm(matrix[begin : begin + rows], up[begin : begin + rows], down, alpha=-1))
    return total


def inner(up_a: Tensor, down_a: Tensor, up_b: Tensor, down_b: Tensor) -> float:
    """<A, B> = sum_ij A_ij B_ij of A = up_a @ down_a and B = up_b @ down_b, without building them, in float64.

    <A, B> = tr(A^T B) = sum((up_a^T up_b) * (down_a down_b^T)); costs (o + i) r_a r_b.
    """
    ups = up_a.double().T @ up_b.double()  # [r_a, r_b]
    downs = down_a.double() @ down_b.double().T
    return float((ups * downs).sum())


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares: of short runs in the tensor's dtype, of these in float64."""
    flat = tensor.reshape(-1)  # a copy only where the tensor is not contiguous
    return math.fsum(torch.dot(part, part).item() for part in torch.split(flat, RUN))


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the user's seed and a tensor's name alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


Part = tuple[Tensor, Tensor, Spectrum]  # U [m, r], U^T X [r, n], and the values that were found


def _exact(x: Tensor, rule: Rule, total: float) -> Part:
    """SVD of X [m, n] by that of the triangular factor: X^T = Q R, R^T = U S V^T."""
    triangle = torch.linalg.qr(x.T.double(), mode="r").R  # [m, m]
    left, values, _ = torch.linalg.svd(triangle.T)
    return _projected(x.double(), left, Spectrum(values, total, _shape(x)), rule, x.dtype)


def _gram(x: Tensor, rule: Rule, total: float) -> Part:
    """X X^T = U S^2 U^T."""
    products = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for columns in torch.split(x, max(CHUNK // len(x), 1), dim=1):
        part = columns.double()
        products.addmm_(part, part.T)
    squares, left = torch.linalg.eigh(products)
    values = squares.flip(0).clamp(min=0).sqrt()
    return _projected(x, left.flip(1), Spectrum(values, total, _shape(x)), rule, x.dtype)


def _projected(x: Tensor, left: Tensor, spectrum: Spectrum, rule: Rule, dtype: torch.dtype) -> Part:
    basis = left[:, : _decided(rule, spectrum)]
    return basis.to(dtype), (basis.to(x.dtype).T @ x).to(dtype), spectrum


def _krylov(x: Tensor, rule: Rule, total: float, guess: int, random: torch.Generator, *, patient: bool) -> Part:
    """Block Krylov iteration on X [m, n]: the span of Y, (X X^T) Y, (X X^T)^2 Y ... holds the leading directions.

    The blocks Q_k are made orthonormal to all before, and P_k = X^T Q_k is kept: the projection Q^T X comes free, and
    the squared singular values within the span are the eigenvalues of the small (Q^T X)(Q^T X)^T. More blocks are added
    until the energy of the leading r stands still. A rule that wants more values than the blocks are made for gets
    wider blocks, begun from what was found.
    """
    m = len(x)
    start = x.new_zeros(m, 0)
    while True:
        width = guess + max(8, guess // 4)
        if width * 5 > m and not patient:
            return _gram(x, rule, total)
        width = min(width, m)
        fresh = torch.randn(x.shape[1], width - start.shape[1], generator=random, dtype=x.dtype)
        basis = torch.linalg.qr(torch.cat([start, x @ fresh], dim=1)).Q  # [m, width]
        images = x.T @ basis  # [n, width]
        products = images.double().T @ images.double()  # (Q^T X)(Q^T X)^T
        captured = -math.inf
        for _ in range(MOST_BLOCKS):
            if basis.shape[1] < m:
                block = _orthonormal(x @ images[:, -width:], basis)
                image = x.T @ block
                products = _extended(products, images, image)
                basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)
            spectrum, vectors = _within(products, total, _shape(x))
            rank = rule(spectrum)
            if rank is None or (rank > guess and basis.shape[1] < m):
                break
            before, captured = captured, float(spectrum.values[:rank].square().sum())
            if captured - before <= CONVERGED * max(total - captured, 1e-12 * total) or basis.shape[1] == m:
                break
        if rank is not None and (rank <= guess or basis.shape[1] == m):
            leading = vectors[:, :rank].to(x.dtype)
            return basis @ leading, leading.T @ images.T, spectrum
        start = basis @ vectors[:, :width].to(x.dtype)
        guess = max(rank or 4 * guess, guess + 1)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what `block` adds to an orthonormal `basis`; done twice, because once leaves rounding."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        block = block[:, : basis.shape[0] - basis.shape[1]]
    return block


def _extended(products: Tensor, images: Tensor, image: Tensor) -> Tensor:
    """P^T P for P = [images, image], given that of `images`; float64."""
    new = image.double()
    cross = images.double().T @ new
    return torch.cat([torch.cat([products, cross], dim=1), torch.cat([cross.T, new.T @ new], dim=1)])


def _within(products: Tensor, total: float, shape: tuple[int, int]) -> tuple[Spectrum, Tensor]:
    """Singular values of Q^T X, and its left vectors [k, k], from (Q^T X)(Q^T X)^T; descending."""
    squares, vectors = torch.linalg.eigh(products)
    values = squares.flip(0).clamp(min=0).sqrt()
    return Spectrum(values, total, shape), vectors.flip(1)


def _decided(rule: Rule, spectrum: Spectrum) -> int:
    rank = rule(spectrum)
    if rank is None:
        raise RuntimeError("a rank rule must decide when it knows all singular values")
    return rank


def _balance(values: Tensor) -> Tensor:
    """Powers of two near the square roots of the singular values."""
    exponents = values.double().clamp(min=torch.finfo(torch.float64).tiny).log2().div(2).round()
    return torch.exp2(exponents.clamp(-60, 60))


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]
