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
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sdops.core.ranks import Rule, Spectrum

Engine = Literal["auto", "exact", "gram", "krylov"]

ENGINES: tuple[Engine, ...] = ("auto", "exact", "gram", "krylov")

CONVERGED = 1.2e-3  # of the squared error: what further blocks may gain; 2e-3 would be 0.1 % of the error itself
MOST_BLOCKS = 8
SMALL_ERROR = 1e-4  # squared, of the energy: below it the work is done in double precision
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

    More blocks are added until the energy of the leading r stands still. A rule that wants more values than the blocks
    are made for gets wider blocks, begun from what was found.
    """
    m = len(x)
    start = x.new_zeros(0, m)
    while True:
        width = guess + max(4, guess // 8)
        if width * 5 > m and not patient:
            return _gram(x, rule, total)
        width = min(width, m)
        fresh = torch.randn(width - len(start), x.shape[1], generator=random, dtype=x.dtype)
        span = _Span(x, torch.cat([start, fresh @ x.T]))
        captured: list[float] = []
        while True:
            spectrum = Spectrum(span.values(), total, _shape(x))
            rank = rule(spectrum)
            if rank is None or (rank > guess and not span.whole):
                break
            captured.append(float(spectrum.values[:rank].square().sum()))
            if span.whole or len(captured) > MOST_BLOCKS or _stands_still(captured, total, x.dtype):
                break
            span.extend()
        if captured and x.dtype == torch.float32 and total - captured[-1] <= SMALL_ERROR * total:
            return _in_double(x, rule, total, max(guess, rank or 0), random, patient=patient)
        vectors = span.vectors()
        if rank is not None and (rank <= guess or span.whole):
            return *span.projected(vectors[:rank]), spectrum
        start = span.projected(vectors[:width])[0].T
        guess = max(rank or 4 * guess, guess + 1)


def _in_double(x: Tensor, rule: Rule, total: float, guess: int, random: torch.Generator, *, patient: bool) -> Part:
    """The same where little of X is left out: single precision, 1e-7 of the energy, cannot tell whether it is least."""
    basis, rest, spectrum = _krylov(x.double(), rule, total, guess, random, patient=patient)
    return basis.to(x.dtype), rest.to(x.dtype), spectrum


def _stands_still(captured: list[float], total: float, dtype: torch.dtype) -> bool:
    """Whether further blocks would gain next to nothing, if gains go on falling as the last one did.

    The gain of the second block says nothing of that: the first one is random.
    """
    error = max(total - captured[-1], 1e-3 * torch.finfo(dtype).eps * total)  # the bound is rounding
    gains = [max(after - before, 0) for before, after in pairwise(captured)]
    falls = min(gains[-1] / gains[-2], 0.99) if len(gains) > 2 and gains[-2] else 0.5
    return bool(gains) and gains[-1] * falls / (1 - falls) <= CONVERGED * error  # gain (falls + falls^2 + ...)


class _Span:
    """Orthonormal rows Q [k, m] in blocks Q_1, Q_2 ..., and their images Q X [k, n].

    Q_j+1 is the part of (Q_j X) X^T that lies outside of all blocks before. So A = X X^T maps Q_j into the span of
    Q_1 ... Q_j+1, and the k x k matrix Q A Q^T is zero but for its diagonal blocks and those beside them.

    Args:
        x: [m, n].
        rows: Span the first block [k, m].
    """

    def __init__(self, x: Tensor, rows: Tensor) -> None:
        self._x = x
        self._basis = torch.linalg.qr(rows.T).Q.T
        self._images = [self._basis @ x]
        self._products = _products(self._images[0], self._images[0])

    @property
    def whole(self) -> bool:
        """Whether the rows span everything."""
        return len(self._basis) == len(self._x)

    def extend(self) -> None:
        """Add a block."""
        last = self._images[-1]
        block = _orthonormal(last @ self._x.T, self._basis)
        image = block @ self._x
        old, new = len(self._products), len(block)
        products = self._products.new_zeros(old + new, old + new)
        products[:old, :old] = self._products
        products[old:, old:] = _products(image, image)
        products[old:, old - len(last) : old] = _products(image, last)  # the lower triangle is what eigh reads
        self._basis, self._products = torch.cat([self._basis, block]), products
        self._images.append(image)

    def values(self) -> Tensor:
        """The singular values of Q X, descending."""
        squares: Tensor = torch.linalg.eigvalsh(self._products)
        return squares.flip(0).clamp(min=0).sqrt()

    def vectors(self) -> Tensor:
        """Rows: the left singular vectors of Q X [k, k], in the order of its values."""
        columns: Tensor = torch.linalg.eigh(self._products).eigenvectors
        return columns.T.flip(0)

    def projected(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """U [m, r] = Q^T V^T and U^T X [r, n] of vectors V [r, k]."""
        vectors = vectors.to(self._x.dtype)
        shares = torch.split(vectors, [len(image) for image in self._images], dim=1)
        rest = shares[0] @ self._images[0]
        for share, image in zip(shares[1:], self._images[1:], strict=True):
            rest.addmm_(share, image)
        return (vectors @ self._basis).T, rest


def _orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows of what `rows` adds to an orthonormal `basis`; done twice, because once leaves rounding."""
    for _ in range(2):
        rows = torch.linalg.qr((rows - rows @ basis.T @ basis).T).Q.T
        rows = rows[: basis.shape[1] - basis.shape[0]]
    return rows


def _products(a: Tensor, b: Tensor) -> Tensor:
    """A B^T, in float64."""
    return a.double() @ b.double().T


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
