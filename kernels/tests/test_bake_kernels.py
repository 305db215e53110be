"""Baking: every weight is the exact W + change rounded once; all families, dtypes, layouts, in one launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sdops_kernels import Bake, Dense, LoHa, LoKr, LoRA, bake, gain_of
from sdops_kernels.reference import bake as bake_by_torch
from sdops_kernels.reference import random_words

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]


class Maker:
    """Random tensors on a device."""

    def __init__(self, device, seed=0):
        self.device = device
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32, size=0.1):
        return (torch.randn(shape, generator=self.random) * size).to(self.device, dtype)

    def lora(self, rows, columns, rank, dtype=torch.float32, **rest):
        up, down = self(rows, rank, dtype=dtype), self(rank, columns, dtype=dtype)
        return LoRA(up, down, rest.pop("scale", 0.5), **rest)


def bits(tensor):
    return tensor.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def run(weights, changes, strengths=(), **options):
    outs = [torch.full_like(weight.float(), float("nan")).to(weight.dtype) for weight in weights]
    for out, weight in zip(outs, weights, strict=True):
        assert out.stride() == weight.stride()
    plan = Bake(weights, outs, changes, backend="triton", **options)
    plan.run(strengths)
    return outs, plan


def wrong(outs, weights, changes, strengths=()):
    """Share of the elements that are not float64's sum, rounded once: only near-ties may be, by another order."""
    found = total = 0
    for out, weight, own in zip(outs, weights, changes, strict=True):
        exact = weight.double().flatten(1).clone()
        for change in own:
            double = [change.first, change.first + change.shape[0]]
            delta = exact_delta(change, weight.double().flatten(1)[slice(*double)])
            exact[slice(*double)] += delta * (strengths[change.slot] if change.slot < len(strengths) else 1.0)
        wanted = exact.cpu().float() if weight.dtype == torch.float32 else nearest(exact.cpu(), weight.dtype)
        found += int((bits(out.flatten(1)) != bits(wanted)).sum())
        total += out.numel()
    return found / total


def exact_delta(change, weight):
    """In float64, from the formula."""
    match change:
        case LoRA():
            delta = change.up.double() @ change.down.double()
        case LoHa():
            delta = (change.w1_a.double() @ change.w1_b.double()) * (change.w2_a.double() @ change.w2_b.double())
        case LoKr():
            delta = torch.kron(change.w1.double(), change.w2.double())
        case Dense():
            delta = change.change.double()
    delta = delta * change.scale
    if change.gain is not None:
        gain = change.gain.double()[:, None] if change.gain_axis == 0 else change.gain.double()[None]
        delta = (weight + delta) * gain - weight
    return delta


def nearest(values, dtype):
    """float64 to a half: torch goes by way of float32, so the neighbours are looked at."""
    middle = values.to(dtype)
    best = middle.clone()
    for end in (float("inf"), -float("inf")):
        other = torch.nextafter(middle, torch.full_like(middle, end))
        better = (other.double() - values).abs() < (best.double() - values).abs()
        best = torch.where(better, other, best)
    return best


SHAPES = [(96, 160), (70, 33), (64, 64), (1, 7), (32, 4, 3, 3)]


@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("base", HALVES, ids=str)
def test_loras_of_any_rank_and_number(device, base, factor):
    make = Maker(device)
    weights = [make(*shape, dtype=base, size=0.03) for shape in SHAPES]
    sizes = [(len(weight), weight[0].numel()) for weight in weights]
    changes = [
        [make.lora(*sizes[0], 4, factor), make.lora(*sizes[0], 20, factor, slot=1)],
        [make.lora(*sizes[1], 33, factor, slot=1)],
        [],
        [make.lora(*sizes[3], 1, factor)],
        [make.lora(*sizes[4], 70, factor), make.lora(*sizes[4], 16, factor, slot=1, scale=-2.0)],
    ]
    outs, _ = run(weights, changes, [0.8, -0.3])
    assert torch.equal(outs[2], weights[2])
    assert wrong(outs, weights, changes, [0.8, -0.3]) <= 1e-3
    again, _ = run(weights, changes, [0.8, -0.3])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outs, again, strict=True))


def test_a_wrong_order_of_roundings_would_be_seen(device):
    """What peers do, three roundings in half precision, is far from the bar above."""
    make = Maker(device)
    weight, change = make(96, 160, dtype=torch.float16, size=0.03), make.lora(96, 160, 16, torch.float16)
    peers = weight + (change.up @ change.down) * change.scale
    assert wrong([peers], [weight], [[change]]) > 1e-2


def test_float32_weights(device):
    make = Maker(device)
    weight, change = make(96, 160), make.lora(96, 160, 16)
    outs, _ = run([weight], [[change]])
    exact = weight.double() + exact_delta(change, None)
    assert float((outs[0].double() - exact).abs().max()) <= 16 * 2.0**-24 * float(exact.abs().max())


def test_other_families(device):
    make = Maker(device)
    weights = [make(*shape, dtype=torch.float16, size=0.03) for shape in [(96, 64), (96, 60), (48, 80), (60, 48)]]
    changes = [
        [LoHa(make(96, 5), make(5, 64), make(96, 5), make(5, 64), 0.7), make.lora(96, 64, 3, slot=1)],
        [LoKr(make(8, 6), make(12, 10), 0.3), LoKr(make(12, 10), make(8, 6), 0.2, slot=1)],
        [Dense(make(48, 80, dtype=torch.float16), 0.5)],
        [make.lora(60, 48, 4), Dense(make(20, 48), 0.5, first=7, slot=1)],
    ]
    outs, _ = run(weights, changes, [0.9, 0.4])
    assert wrong(outs, weights, changes, [0.9, 0.4]) <= 2e-3


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_on_top_of_families(device, axis):
    make = Maker(device)
    weights = [make(64, 96, dtype=torch.float16, size=0.03), make(32, 6, 3, 3, dtype=torch.bfloat16, size=0.03)]
    plain = [make.lora(64, 96, 4), LoKr(make(4, 6), make(8, 9), 0.3)]
    magnitudes = [make(weight.shape[axis], size=0.01).add_(0.3) for weight in weights]
    changes = [
        [replace_gain(change, gain_of(weight, change, magnitude, axis), axis)]
        for change, weight, magnitude in zip(plain, weights, magnitudes, strict=True)
    ]
    changes[0].append(make.lora(64, 96, 3, slot=1))
    outs, _ = run(weights, changes, [0.7])
    assert wrong(outs, weights, changes, [0.7]) <= 2e-3
    outs, _ = run(weights, [changes[0][:1], changes[1]], [0.0])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outs, weights, strict=True))


def replace_gain(change, gain, axis):
    parts = {name: getattr(change, name) for name in (("up", "down") if isinstance(change, LoRA) else ("w1", "w2"))}
    return type(change)(**parts, scale=change.scale, gain=gain, gain_axis=axis)


def test_slices_of_fused_rows(device):
    make = Maker(device)
    weight = make(96, 64, dtype=torch.float16, size=0.03)
    changes = [make.lora(32, 64, 4, first=start, slot=slot) for slot, start in enumerate((0, 32, 64))]
    changes += [make.lora(40, 64, 5, first=13, slot=3), make.lora(96, 64, 2, slot=4)]
    strengths = [0.5, -1.0, 0.0, 2.0, 1.0]
    outs, _ = run([weight], [changes], strengths)
    assert wrong(outs, [weight], [changes], strengths) <= 1e-3


def test_weights_of_any_strides(device):
    make = Maker(device)
    wide = make(96, 200, dtype=torch.float16, size=0.03)
    weights = [
        wide[:, 16:80],  # rows of a larger matrix
        make(64, 96, dtype=torch.float16, size=0.03).T,  # stored by columns
        make(32, 16, 3, 3, dtype=torch.float16, size=0.03).to(memory_format=torch.channels_last),
        wide[:, ::2],
    ]
    sizes = [(len(weight), weight[0].numel()) for weight in weights]
    changes = [[make.lora(*size, 5), make.lora(size[0] // 2, size[1], 3, first=3)] for size in sizes]
    changes[1].append(LoKr(make(8, 8), make(12, 8), 0.3))
    changes[2].append(LoKr(make(8, 9), make(4, 16), 0.3))
    changes[1].append(replace_gain(make.lora(*sizes[1], 3), make(96, size=0.01) + 1, 0))
    outs = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=device) for w in weights]
    Bake(weights, outs, changes, backend="triton").run()
    assert wrong(outs, weights, changes) <= 1e-3
    assert outs[1].stride() == weights[1].stride()


def test_in_place_and_from_the_pristine_weight(device):
    make = Maker(device)
    pristine, change = make(64, 64, dtype=torch.bfloat16, size=0.03), make.lora(64, 64, 4)
    live = pristine.clone()
    plan = Bake([pristine], [live], [[change]], backend="triton")
    plan.run([0.7])
    first = live.clone()
    for strength in (1.0, -3.0, 0.2, 0.7):
        plan.run([strength])
    assert torch.equal(bits(live), bits(first))
    plan.run([0.0])
    assert torch.equal(bits(live), bits(pristine))
    once = pristine.clone()
    Bake([once], [once], [[change]], backend="triton").run([0.7])
    assert torch.equal(bits(once), bits(first))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weights_get_new_scales(device, dtype, per_row):
    make = Maker(device)
    scales = [make(64 if per_row else 1, size=0.001).abs_().add_(1e-3) for _ in range(2)]
    weights = [make(64, shape, size=100).to(dtype) for shape in (96, 33)]
    changes = [[make.lora(64, weight.shape[1], 4)] for weight in weights]
    outs, plan = run(weights, changes, scales=scales)
    for out, scale, weight, own, read in zip(outs, plan.scales, weights, changes, scales, strict=True):
        wanted, new = bake_by_torch(weight, own, dtype, scale=read)
        torch.testing.assert_close(scale.reshape(-1), new.reshape(-1), rtol=1e-6, atol=0)
        assert int((bits(out) != bits(wanted)).sum()) <= 2
        assert float(out.float().abs().max()) == torch.finfo(dtype).max


def test_fp8_weights_to_halves(device):
    make = Maker(device)
    weight, scale = make(64, 96, size=100).to(torch.float8_e4m3fn), torch.tensor([1e-3], device=device)
    out, change = torch.empty(64, 96, dtype=torch.float16, device=device), make.lora(64, 96, 4)
    Bake([weight], [out], [[change]], scales=[scale], backend="triton").run()
    wanted, _ = bake_by_torch(weight, [change], torch.float16, scale=scale)
    assert int((bits(out) != bits(wanted)).sum()) <= 2


@pytest.mark.parametrize("shape", [(64, 96), (33, 31)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("base", HALVES, ids=str)
def test_rounding_at_random_has_the_words_of_philox(device, base, shape):
    make = Maker(device)
    weight, change = make(*shape, dtype=base, size=0.03), make.lora(*shape, 4, scale=0.01)
    outs, _ = run([weight], [[change]], keys=[(0x89ABCDEF, 0x01234567)])
    wanted, _ = bake_by_torch(weight, [change], base, key=(0x89ABCDEF, 0x01234567))
    assert int((bits(outs[0]) != bits(wanted)).sum()) <= 2
    other, _ = run([weight], [[change]], keys=[(0x89ABCDEF, 0x01234568)])
    assert not torch.equal(bits(outs[0]), bits(other[0]))
    error = outs[0].double() - weight.double() - exact_delta(change, None)
    assert abs(float(error.mean())) < 4 * float(error.std()) / error.numel() ** 0.5


def test_philox_is_the_published_one():
    """The first known answer of Random123: counter 0, key 0."""
    assert [hex(word) for word in random_words((0, 0), 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_both_backends_offer_the_same(device):
    make = Maker(device)
    weight, change = make(64, 64, dtype=torch.float16, size=0.03), make.lora(64, 64, 4, slot=1)
    outs = [torch.empty_like(weight) for _ in range(2)]
    for out, backend in zip(outs, ("triton", "torch"), strict=True):
        Bake([weight], [out], [[change]], backend=backend).run([0.0, 0.5])
    assert int((bits(outs[0]) != bits(outs[1])).sum()) <= 1
    assert torch.equal(bake([weight], [[replace(change)]], [0.0, 0.5])[0], outs[1]) or device == "cuda"


def test_what_does_not_fit_is_refused():
    weight = torch.zeros(8, 8)
    with pytest.raises(ValueError, match="a change of rows 4"):
        Bake([weight], [weight], [[LoRA(torch.zeros(8, 2), torch.zeros(2, 8), first=4)]])
    with pytest.raises(ValueError, match="different ranks"):
        LoRA(torch.zeros(8, 2), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="fp8 weights have scales"):
        Bake([weight.to(torch.float8_e4m3fn)], [weight.to(torch.float8_e4m3fn)], [[]])
