"""DoRA's gains of all layers at once, against float64."""

from __future__ import annotations

import pytest
import torch
from sdops_kernels import Dense, LoHa, LoKr, LoRA, dora_gains
from test_bake_kernels import Maker, exact_delta

HALVES = [torch.float16, torch.bfloat16]


def layers(make, dtype, factor):
    """Layers of all kinds and sizes, some of rows of a larger weight, one of a stored transpose."""
    whole = make(96, 160, dtype=dtype, size=0.03)
    return [
        (whole, make.lora(96, 160, 4, factor)),
        (whole[32:64], make.lora(32, 160, 70, factor, first=32)),
        (make(70, 33, dtype=dtype, size=0.03), make.lora(70, 33, 20, factor)),
        (make(32, 6, 3, 3, dtype=dtype, size=0.03), make.lora(32, 54, 5, factor)),
        (make(64, 96, dtype=dtype, size=0.03).T, LoKr(make(8, 8), make(12, 8), 0.3)),
        (make(48, 64, dtype=dtype, size=0.03), LoHa(make(48, 5), make(5, 64), make(48, 5), make(5, 64), 0.7)),
        (make(20, 48, dtype=dtype, size=0.03), Dense(make(20, 48), 0.5)),
    ]


def exact(weight, change, magnitude, axis):
    directed = weight.double().flatten(1) + exact_delta(change, None)
    shaped = directed.reshape(weight.shape)
    norm = shaped.square().sum([dim for dim in range(weight.ndim) if dim != axis]).sqrt()
    gain = magnitude.double() / (norm + torch.finfo(torch.float32).eps)
    return gain if axis == 0 else gain.repeat_interleave(weight[0, 0].numel())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("base", "factor"),
    [(HALVES[0], HALVES[0]), (HALVES[1], torch.float32), (torch.float32, HALVES[1])],
    ids=str,
)
def test_gains_are_those_of_float64(device, base, factor, axis):
    make = Maker(device)
    own = layers(make, base, factor)
    weights, changes = [weight for weight, _ in own], [change for _, change in own]
    magnitudes = [make(weight.shape[axis], size=0.01).add_(0.3) for weight in weights]
    axes = [axis] * len(own)
    found = dora_gains(weights, changes, magnitudes, axes, backend="triton")
    plain = dora_gains(weights, changes, magnitudes, axes, backend="torch")
    for gain, other, weight, change, magnitude in zip(found, plain, weights, changes, magnitudes, strict=True):
        wanted = exact(weight, change, magnitude, axis)
        assert gain.shape == wanted.shape
        torch.testing.assert_close(gain.double(), wanted, rtol=2e-6, atol=0)
        torch.testing.assert_close(gain, other, rtol=4e-6, atol=0)
    again = dora_gains(weights, changes, magnitudes, axes, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_fp8_weights_are_taken_times_their_scales(device):
    make = Maker(device)
    weight, change = make(64, 96, size=100).to(torch.float8_e4m3fn), make.lora(64, 96, 4)
    for scale in (make(1, size=0.001).abs_().add_(1e-3), make(64, size=0.001).abs_().add_(1e-3)):
        magnitude = make(64, size=0.01).add_(0.3)
        options = {"scales": [scale]}
        found = dora_gains([weight], [change], [magnitude], backend="triton", **options)[0]
        wanted = exact(weight.double() * scale.double().reshape(-1, 1), change, magnitude, 0)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a change of"):
        dora_gains([torch.zeros(8, 8)], [LoRA(torch.zeros(4, 2), torch.zeros(2, 8))], [torch.zeros(8)])
    assert dora_gains([], [], []) == []
