"""A linear layer with a LoRA: values and gradients of the formula, the same bits every time."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from sdops_kernels import Choices, lora_linear, reference
from sdops_kernels.lora_linear import backward_by_kernel, forward_by_kernel

module = import_module("sdops_kernels.lora_linear")  # the package has a function of that name

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


def close(found, exact, dtype):
    return float((found.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max()) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_of_both_passes(device, shape, dtype):
    x, weight, bias, down, up = parts(shape, device, dtype)
    x64, weight64, bias64, down64, up64 = (part.double() for part in (x, weight, bias, down, up))
    low = 0.7 * (x64 @ down64.T)
    for vector in (None, bias):
        result, inner = forward_by_kernel(x, weight, vector, down, up, 0.7)
        exact = torch.nn.functional.linear(x64, weight64, None if vector is None else bias64)
        assert close(inner, low, dtype)
        assert close(result, exact + low.to(dtype).double() @ up64.T, dtype)
    gradient = parts(shape, device, dtype, seed=1)[0] @ weight.T
    wide = gradient.double()
    low = 0.7 * (wide @ up64)
    for_x, for_down, for_up = backward_by_kernel(gradient, x, weight, inner, down, up, 0.7)
    assert close(for_x, wide @ weight64 + low.to(dtype).double() @ down64, dtype)
    assert close(for_down, low.to(dtype).double().T @ x64, dtype)
    assert close(for_up, wide.T @ inner.double(), dtype)
    assert (for_x.shape, for_down.shape, for_up.shape) == (x.shape, down.shape, up.shape)


def test_gradients_of_many_slabs_are_the_same_every_time(device):
    shape = (1100, 48, 40, 5)  # four slabs, the last one shorter
    x, weight, _, down, up = parts(shape, device, torch.float32)
    inner, gradient = parts((1100, 5, 40, 1), device, torch.float32)[0], x @ weight.T
    found = [backward_by_kernel(gradient, x, weight, inner, down, up, 0.7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    wanted = reference.lora_backward(*(t.double() for t in (gradient, x, weight, inner, down, up)), 0.7)
    assert all(close(a, b, torch.float32) for a, b in zip(found[0], wanted, strict=True))


def name_of(device):
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def test_chosen_kernels_train_as_the_plain_way_does(device, monkeypatch):
    if device == "cpu":  # the interpreter, in place of the operators' plain way there
        monkeypatch.setattr(module, "default_backend", lambda _: "triton")
    shape, dtype = SHAPES[0], torch.float16
    choices = Choices({name_of(device): {way: [[str(dtype), *shape]] for way in ("forward", "backward")}})
    x, weight, bias, down, up = parts(shape, device, dtype)
    assert choices.fused(x, shape) == (True, True)
    found = []
    for own in (choices, None):
        leaves = [part.clone().requires_grad_() for part in (x, down, up)]
        result = lora_linear(leaves[0].reshape(1, *x.shape), weight, bias, leaves[1], leaves[2], 0.7, choices=own)
        result.square().sum().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert close(one.double(), other.double(), dtype)
        assert not torch.equal(one, other) or device == "cuda"  # it was the kernels
    leaf = down.clone().requires_grad_()  # x needs no gradient: the plain way leaves it out
    lora_linear(x, weight, bias, leaf, up, 0.7, choices=choices).sum().backward()
    assert leaf.grad is not None


def test_what_is_too_large_for_32_bits_is_left_to_torch(device, monkeypatch):
    monkeypatch.setattr(module, "default_backend", lambda _: "triton")
    x, weight, bias, down, up = parts(SHAPES[0], device, torch.float16)
    ways = {"kernel": forward_by_kernel, "torch": reference.lora_forward}
    wanted = {name: way(x, weight, bias, down, up, 0.7)[0] for name, way in ways.items()}
    assert not torch.equal(*wanted.values())
    for most, name in ((weight.numel() + 1, "kernel"), (weight.numel(), "torch")):  # the largest of its matrices
        monkeypatch.setattr(module, "MOST", most)
        found, _ = torch.ops.sdops_kernels.lora_forward(x, weight, bias, down, up, 0.7)
        assert torch.equal(found, wanted[name])


def test_what_was_measured_is_chosen_and_kept(device, tmp_path, monkeypatch):
    assert Choices().fused(torch.zeros(4, 4), (4, 4, 4, 1)) == (False, False)
    times = iter([1.0, 0.9, 1.0, 0.99, 1.0, 1.1, 1.0, 0.5])
    monkeypatch.setattr(module, "_milliseconds", lambda work, _: (work(), next(times))[1])
    choices = Choices()
    choices.measure([(16, 16, 16, 2), (16, 16, 32, 2)], torch.float32, device)
    first, second = (["torch.float32", 16, 16, outputs, 2] for outputs in (16, 32))
    assert choices.faster == {name_of(device): {"forward": [first], "backward": [second]}}
    choices.save(tmp_path / "choices.json")
    kept = Choices.load(tmp_path / "choices.json")
    x = torch.zeros(16, 16, device=device)
    assert kept.fused(x, (16, 16, 16, 2)) == (True, False)
    assert kept.fused(x, (16, 16, 32, 2)) == (False, True)
    assert kept.fused(x, (16, 16, 48, 2)) == (False, False)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("fused", [False, True])
def test_it_compiles_in_one_graph(device, fused):
    shape = SHAPES[0]
    kept = [["torch.float32", *shape]] if fused else []
    choices = Choices({name_of(device): {"forward": kept, "backward": kept}})
    x, weight, bias, down, up = parts(shape, device, torch.float32)
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [part.clone().requires_grad_() for part in (x, down, up)]
        layer = wrap(lambda a, b, c: lora_linear(a, weight, bias, b, c, 0.7, choices=choices))
        layer(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
