"""DARE and TIES: the same bits as the plain formulas, masks and order statistics exact."""

from __future__ import annotations

import pytest
import torch
from sdops_kernels import SparseMerge, sparse_merge
from sdops_kernels.reference import largest

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(3, 5, 100), (32, 64), (1,), (0,)]
KEYS = [[(17 * i + j, 0xFFFFFFFF - i) for j in range(3)] for i in range(len(SHAPES))]


def bits(tensor):
    return tensor.cpu().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def inputs(count, dtype, device):
    """A base and fine-tunes; in half precision most of the changes are equal to many others."""
    random = torch.Generator().manual_seed(0)
    base = [torch.randn(shape, generator=random) * 0.03 for shape in SHAPES]
    models = [[x + torch.randn(x.shape, generator=random) * 1e-3 for x in base] for _ in range(count)]
    return [x.to(device, dtype) for x in base], [[x.to(device, dtype) for x in model] for model in models]


@pytest.mark.parametrize(
    ("dtype", "normalize"), [*((dtype, False) for dtype in DTYPES), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_the_formula_to_the_bit(device, method, dtype, normalize):
    base, models = inputs(3, dtype, device)
    outs = [[torch.full_like(x, float("nan")) for x in base] for _ in range(2)]
    for backend, own in zip(("triton", "torch"), outs, strict=True):
        merge = SparseMerge(
            method,
            base,
            models,
            own,
            density=[0.77, 0.2, 0.5, 0.1],
            weights=[1.0, 0.7, -0.4],
            scale=0.9,
            normalize=normalize,
            keys=KEYS,
            backend=backend,
        )
        merge.run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outs, strict=True))
    assert not torch.equal(outs[0][1], base[1])


@pytest.mark.parametrize("density", [0.0, 1e-4, 0.5, 1.0])
def test_ends_of_the_density(device, density):
    base, models = inputs(2, torch.float16, device)
    for method in ("ties", "dare_linear"):
        outs = [[torch.empty_like(x) for x in base] for _ in range(2)]
        for backend, own in zip(("triton", "torch"), outs, strict=True):
            options = {"density": density, "keys": [key[:2] for key in KEYS], "backend": backend}
            SparseMerge(method, base, models, own, **options).run()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outs, strict=True))
        if density == 0:
            assert all(torch.equal(a, b) for a, b in zip(outs[0], base, strict=True))


def test_equals_at_the_border_are_kept_in_their_order(device):
    base = torch.zeros(5000, dtype=torch.float32, device=device)
    model = torch.ones(5000, dtype=torch.float32, device=device)
    model[4000] = 3.0
    out = torch.empty_like(base)
    SparseMerge("ties", [base], [[model]], [out], density=0.4, backend="triton").run()
    assert out.nonzero()[:, 0].tolist() == [*range(1999), 4000]
    assert int(largest(model, 0.4).sum()) == 2000


def test_a_mask_keeps_its_share(device):
    base, model = torch.zeros(1 << 14, device=device), torch.ones(1 << 14, device=device)
    out = torch.empty_like(base)
    SparseMerge("dare_linear", [base], [[model]], [out], density=0.3, keys=[[(1, 2)]], backend="triton").run()
    share = float((out > 0).float().mean())
    assert abs(share - 0.3) < 4 * (0.21 / (1 << 14)) ** 0.5


def test_what_is_no_number_is_refused(device):
    base, models = inputs(2, torch.float16, device)
    models[1][1].view(-1)[5] = float("nan")
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match="tensor 1 holds"):
            sparse_merge("dare_linear", base, models, density=1.0, keys=[key[:2] for key in KEYS], backend=backend)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4)
    for options in (
        {"density": 2.0},
        {"density": 0.5, "weights": [1, 2]},
        {"density": 0.5, "normalize": True, "weights": [0]},
    ):
        with pytest.raises(ValueError, match=r"density is a share|numbers of|sum to zero"):
            sparse_merge("dare_linear", [x], [[x]], keys=[[(0, 0)]], **options)
