"""Inner products of models: right to the last digits of float64, the same every time."""

from __future__ import annotations

from math import fsum

import pytest
import torch
from sdops_kernels import inner_products

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(33, 31), (2, 5, 1031), (64, 64), (0,), (1,)]


def models(count, dtype, device):
    random = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=random).to(device, dtype) for shape in SHAPES] for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_product_is_right(device, dtype, count):
    inputs = models(count, dtype, device)
    found = inner_products(inputs, backend="triton")
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    plain = inner_products(inputs, backend="torch")
    for place in range(len(SHAPES)):
        flat = [model[place].flatten().double() for model in inputs]
        for i in range(count):
            for j in range(i + 1):
                products = (flat[i] * flat[j]).tolist()  # exact: 24 + 24 bits
                for own in (found, plain):
                    assert abs(float(own[place, i, j]) - fsum(products)) <= 2.0**-46 * fsum(map(abs, products))
    assert torch.equal(found, inner_products(inputs, backend="triton"))


def test_long_tensors_are_several_runs(device):
    x = [torch.ones(200_003, device=device), torch.full((200_003,), 2.0, device=device)]
    found = inner_products([[x[0]], [x[1]]], backend="triton")
    assert found[0].tolist() == [[200_003.0, 400_006.0], [400_006.0, 800_012.0]]


def test_several_dtypes_and_what_does_not_fit(device):
    x, y = torch.ones(64, device=device), torch.full((64,), 0.5, dtype=torch.float16, device=device)
    assert inner_products([[x], [y]], backend="triton")[0].tolist() == [[64.0, 32.0], [32.0, 16.0]]
    with pytest.raises(ValueError, match="equal shapes"):
        inner_products([[x], [y[:3]]])
    assert inner_products([[], []]).shape == (0, 2, 2)
