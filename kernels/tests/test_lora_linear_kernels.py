"""A linear layer with a LoRA: values and gradients of the formula, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from sdops_kernels import Choices, lora_linear
from sdops_kernels.lora_linear import _forward_fused

SHAPES = [(33, 48, 64, 4), (130, 96, 40, 16), (7, 20, 24, 33)]


def parts(shape, device, dtype, seed=0):
    tokens, inputs, outputs, rank = shape
    random = torch.Generator().manual_seed(seed)

    def make(*size):
        return (torch.randn(size, generator=random) / size[-1] ** 0.5).to(device, dtype)

    return make(tokens, inputs), make(outputs, inputs), make(outputs), make(rank, inputs), make(outputs, rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(device, shape, bias):
    x, weight, own_bias, down, up = (part.double().requires_grad_() for part in parts(shape, device, torch.float32))
    vector = own_bias.detach() if bias else None
    frozen = weight.detach()
    x = x.detach().reshape(1, *x.shape).requires_grad_()
    torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, frozen, vector, a, b, 0.7), (x[:, :3], down, up))
    wanted = torch.nn.functional.linear(x, frozen, vector) + 0.7 * (x @ down.T @ up.T)
    torch.testing.assert_close(lora_linear(x, frozen, vector, down, up, 0.7), wanted)


def test_gradients_are_the_same_every_time(device):
    x, weight, bias, down, up = parts((130, 96, 40, 16), device, torch.float32)
    found = []
    for _ in range(3):
        leaves = [part.clone().requires_grad_() for part in (x, down, up)]
        lora_linear(leaves[0], weight, bias, leaves[1], leaves[2], 0.5).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for run in found[1:] for a, b in zip(run, found[0], strict=True))


def test_frozen_parts_get_no_gradient(device):
    x, weight, bias, down, up = (part.requires_grad_() for part in parts(SHAPES[0], device, torch.float32))
    lora_linear(x.detach(), weight, bias, down, up.detach()).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert up.grad is None
    assert down.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_forward_pass(device, shape, dtype):
    x, weight, bias, down, up = parts(shape, device, dtype)
    for vector in (None, bias):
        result, inner = _forward_fused(x, weight, vector, down, up, 0.7)
        low = 0.7 * (x.double() @ down.double().T)
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if vector is None else vector.double())
        exact = exact + low.to(dtype).double() @ up.double().T
        unit = torch.finfo(dtype).eps
        assert float((inner.double() - low).abs().max()) <= 2 * unit * float(low.abs().max()) + 1e-6
        assert float((result.double() - exact).abs().max()) <= 2 * unit * float(exact.abs().max()) + 1e-5


def test_without_a_measurement_the_plain_way_is_taken(tmp_path):
    choices = Choices()
    assert not choices.fused(torch.zeros(4, 4), (4, 4, 4, 1))
    Choices({"some GPU": [["torch.bfloat16", 1, 2, 3, 4]]}).save(tmp_path / "choices.json")
    assert Choices.load(tmp_path / "choices.json").faster == {"some GPU": [["torch.bfloat16", 1, 2, 3, 4]]}
