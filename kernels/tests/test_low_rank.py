"""Factors of many matrices: as good as the best ones, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch
from sdops_kernels import low_rank, singular_factors
from sdops_kernels.low_rank import orthonormal

SPECTRA = {
    "flat": torch.ones,
    "slow": lambda k: torch.arange(1, k + 1) ** -0.5,
    "fast": lambda k: torch.exp(-torch.arange(k) / 5.0),
    "deficient": lambda k: (torch.arange(k) < 5).float(),
}


def matrix(shape, spectrum, seed):
    random = torch.Generator().manual_seed(seed)
    short = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, short, generator=random).double()).Q for size in shape)
    return (left * SPECTRA[spectrum](short).double() @ right.T).float()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_the_least_possible_one(device, spectrum, rank):
    shapes = [(120, 90), (90, 120), (120, 90), (64, 300), (12, 9)]
    matrices = [matrix(shape, spectrum, seed).to(device) for seed, shape in enumerate(shapes)]
    for found, own in zip(low_rank(matrices, rank), matrices, strict=True):
        values = torch.linalg.svdvals(own.double())
        best = float(values[rank:].square().sum().sqrt())
        error = float((own.double() - found.up.double() @ found.down.double()).norm())
        assert error <= 1.001 * best + 5e-5 * float(own.norm())
        assert found.residual**0.5 == pytest.approx(error, rel=1e-3, abs=2e-3 * float(own.norm()))
        kept = min(rank, len(values))
        assert found.up.shape == (own.shape[0], kept)
        top = found.values[:kept].cpu()
        assert torch.allclose(top, values[:kept].cpu(), rtol=0.02, atol=1e-5 * float(values[0]))
        norms = found.up.norm(dim=0) / found.down.norm(dim=1).clamp(min=1e-20)
        assert bool(((norms > 0.4) & (norms < 2.5))[: 4 if spectrum == "deficient" else kept].all())


def test_nothing_is_the_product_of_nothing(device):
    found = low_rank([torch.zeros(20, 30, device=device)], 4)[0]
    assert float((found.up @ found.down).abs().max()) == 0
    assert found.energy == found.residual == 0


def test_blocks_are_orthonormal(device):
    random = torch.Generator().manual_seed(0)
    columns = torch.randn(3, 200, 40, generator=random)
    columns[1] = columns[1] @ torch.diag(torch.logspace(0, -6, 40))
    columns[2, :, 1] = columns[2, :, 0] * (1 + 1e-4) + 1e-3 * columns[2, :, 1]
    made = orthonormal(columns.to(device)).double().cpu()
    assert float((made.mT @ made - torch.eye(40)).abs().max()) < 1e-5


def test_batches_change_next_to_nothing(device):
    matrices = [matrix((60, 80), "slow", seed).to(device) for seed in range(5)]
    together, apart = low_rank(matrices, 8), [low_rank([own], 8)[0] for own in matrices]
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one.up @ one.down, other.up @ other.down, atol=1e-2)
        assert one.residual == pytest.approx(other.residual, rel=1e-3)
    small = low_rank(matrices, 8, memory=60 * 80 * 4)
    assert all(a.residual == pytest.approx(b.residual, rel=1e-3) for a, b in zip(small, together, strict=True))


def test_products_in_terms_of_their_singular_vectors(device):
    random = torch.Generator().manual_seed(0)
    shapes = [(60, 8, 40), (60, 8, 40), (40, 16, 90), (6, 8, 30), (30, 8, 5)]
    pairs = [
        (torch.randn(o, rank, generator=random), torch.randn(rank, i, generator=random) * 0.01) for o, rank, i in shapes
    ]
    pairs[1] = (pairs[1][0][:, [0, 0, 1, 2, 3, 4, 5, 6]], pairs[1][1])  # of a lower rank than it looks
    graded = torch.logspace(0, -5, 8)  # columns and rows of very different lengths
    pairs += [(pairs[0][0] * graded, pairs[0][1]), (pairs[0][0], graded[:, None] * pairs[0][1])]
    pairs.append((torch.zeros(20, 4), torch.zeros(4, 10)))
    pairs = [(up.to(device), down.to(device)) for up, down in pairs]
    for (up, down), (first, second) in zip(pairs, singular_factors(*zip(*pairs, strict=True)), strict=True):
        exact = up.double() @ down.double()
        values = torch.linalg.svdvals(exact)
        size = float(values[0])
        found = first.norm(dim=0) * second.norm(dim=1)
        assert torch.allclose(found, values[: len(found)], atol=1e-7 * size)
        for rank in range(len(found) + 1):
            left = torch.linalg.norm(exact - first[:, :rank] @ second[:rank])
            assert float(left) <= float(values[rank:].square().sum().sqrt()) + 1e-7 * size
