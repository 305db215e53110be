"""Linear merges: the bits of the exact sum, whatever the kernel, the dtype and the order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from sdops_kernels import LinearMerge, linear_merge

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
RECIPES = [("half", [0.5, 0.5]), ("decimal", [0.7, 0.3]), ("difference", [1, 0.7, -0.7]), ("three", [0.5, 0.3, 0.2])]


def single(value):
    return Fraction(float(torch.tensor(value, dtype=torch.float32)))


def exact_coefficients(values):
    """As a merge has them: float32, but for the first, which makes the sum what it should be."""
    rest = [single(value) for value in values[1:]]
    return [Fraction(str(sum(Fraction(str(value)) for value in values))) - sum(rest), *rest]


def bits(tensor):
    return tensor.cpu().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def nearest(value, dtype):
    """The number of a dtype next to a Fraction, ties to even; found by looking at the neighbours."""
    middle = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    up, down = (torch.nextafter(middle, torch.tensor(end, dtype=dtype)) for end in (float("inf"), -float("inf")))
    candidates = sorted(
        (x for x in (middle, up, down) if torch.isfinite(x)),
        key=lambda x: (abs(Fraction(float(x)) - value), int(bits(x)) & 1),
    )
    return candidates[0]


def models(count, dtype, device, seed=0):
    """Fine-tunes of one base: most sums lie on or beside a tie. Odd sizes, an aligned one, and an empty one."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(33, 31), (2, 5, 1031), (64, 64), (0,), (1,)]
    base = [torch.randn(shape, generator=random) * 0.03 for shape in shapes]
    change = [[torch.randn(x.shape, generator=random) * 1e-3 for x in base] for _ in range(count)]
    return [[(x + y).to(device, dtype) for x, y in zip(base, each, strict=True)] for each in change]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "values"), RECIPES, ids=[name for name, _ in RECIPES])
def test_every_element_is_the_exact_sum_rounded_once(device, dtype, name, values):
    coefficients = exact_coefficients(values)
    inputs = models(len(values), dtype, device)
    outs = [torch.full_like(x, float("nan")) for x in inputs[0]]
    LinearMerge(inputs, outs, coefficients, backend="triton").run()
    for place in (0, 4):
        exact = [
            sum(c * Fraction(float(x)) for c, x in zip(coefficients, column, strict=True))
            for column in zip(*(model[place].flatten().tolist() for model in inputs), strict=True)
        ]
        wanted = torch.stack([nearest(value, dtype) for value in exact]).reshape(outs[place].shape)
        assert torch.equal(bits(outs[place]), bits(wanted))
    assert not any(torch.isnan(out).any() for out in outs)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_reference_agree_to_the_bit(device, dtype, out):
    inputs, coefficients = models(3, dtype, device, seed=1), exact_coefficients([0.4, 0.5, 0.1])
    outs = [[torch.full_like(x, float("nan"), dtype=out) for x in inputs[0]] for _ in range(2)]
    for backend, own in zip(("triton", "torch"), outs, strict=True):
        LinearMerge(inputs, own, coefficients, backend=backend).run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outs, strict=True))


def test_inputs_of_several_dtypes(device):
    inputs = [
        [x.to(device, dtype) for x in models(1, torch.float32, device, seed)[0]] for seed, dtype in enumerate(DTYPES)
    ]
    outs = [[torch.empty_like(x) for x in inputs[0]] for _ in range(2)]
    for backend, own in zip(("triton", "torch"), outs, strict=True):
        LinearMerge(inputs, own, exact_coefficients([0.2, 0.5, 0.3]), backend=backend).run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outs, strict=True))


def test_what_float32_cannot_decide_is_settled(device):
    """1 + 2^-11 is a tie of float16; 2^-64 decides, which is lost while 2^-24 stands beside it."""
    one, tie, bit = torch.ones(1024), torch.full((1024,), 2.0**-11), torch.full((1024,), 2.0**-24)
    inputs = [[x.to(device, torch.float16)] for x in (one, tie, bit, bit, bit)]
    for sign, expected in ((1, 1 + 2**-10), (-1, 1.0), (0, 1.0)):
        out = [torch.empty_like(inputs[0][0])]
        coefficients = [Fraction(1), Fraction(1), Fraction(1), sign * Fraction(2) ** -40, Fraction(-1)]
        merged = LinearMerge(inputs, out, coefficients, backend="triton").run()
        assert merged.settled == abs(sign)
        assert bool((out[0] == expected).all())


def test_cancellation_beyond_float64_is_exact(device):
    values = [1.0, -1.0, 2.0**-100, 2.0**-126, 1.1754943508222875e-38]
    inputs = [[torch.full((32,), value, device=device, dtype=torch.float32)] for value in values]
    outs = [[torch.empty_like(inputs[0][0])] for _ in range(2)]
    merged = [
        LinearMerge(inputs, own, [Fraction(1)] * 5, backend=backend).run()
        for backend, own in zip(("triton", "torch"), outs, strict=True)
    ]
    assert merged[0].settled == 1
    assert float(outs[0][0][0]) == 2.0**-100
    assert torch.equal(bits(outs[0][0]), bits(outs[1][0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_signs_of_zero_are_those_of_the_sum(device, dtype):
    zero, minus = torch.zeros(64, dtype=dtype), -torch.zeros(64, dtype=dtype)
    for pair in ((minus, minus), (minus, zero), (zero, minus)):
        for coefficients in (exact_coefficients([0.7, 0.3]), [Fraction(3, 2), Fraction(-1, 2)]):
            outs = [torch.ones(64, dtype=dtype, device=device) for _ in range(2)]
            for backend, own in zip(("triton", "torch"), outs, strict=True):
                LinearMerge([[x.to(device)] for x in pair], [own], coefficients, backend=backend).run()
            assert torch.equal(bits(outs[0]), bits(outs[1]))


def test_what_is_too_large_is_clamped_and_counted(device):
    x = torch.tensor([60000.0, -60000.0, 65504.0, 1.0] * 8).to(device, torch.float16)
    out = torch.empty_like(x)
    merged = LinearMerge([[x], [x]], [out], [Fraction(1), Fraction(1, 2)], backend="triton").run()
    assert merged.clamped == {0: 24}
    assert out[:4].tolist() == [65504.0, -65504.0, 65504.0, 1.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_no_number_is_refused(device, bad, backend):
    inputs = models(2, torch.float16, device)
    inputs[1][1].view(-1)[77] = bad
    with pytest.raises(ValueError, match="tensor 1 holds NaN or infinity"):
        LinearMerge(inputs, [torch.empty_like(x) for x in inputs[0]], [0.5, 0.5], backend=backend).run()


def test_zero_weights_leave_a_model_out(device):
    inputs = models(2, torch.float16, device)
    inputs[1][0].fill_(float("nan"))
    outs = [torch.empty_like(x) for x in inputs[0]]
    LinearMerge(inputs, outs, [[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]], backend="triton").run()
    assert torch.equal(outs[0], inputs[0][0])
    assert torch.equal(outs[2], inputs[1][2])


def test_in_place_and_twice(device):
    inputs = models(2, torch.bfloat16, device)
    outs = linear_merge(inputs, exact_coefficients([0.7, 0.3]))
    plan = LinearMerge(inputs, inputs[0], exact_coefficients([0.7, 0.3]), backend="triton")
    plan.run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outs, inputs[0], strict=True))


def test_fast_mode_is_close(device):
    inputs = models(3, torch.float16, device)
    outs = [torch.empty_like(x) for x in inputs[0]]
    LinearMerge(inputs, outs, [0.5, 0.3, 0.2], exact=False, backend="triton").run()
    exact = linear_merge(inputs, [0.5, 0.3, 0.2])
    wrong = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(outs, exact, strict=True))
    assert 0 < wrong < 0.05 * sum(x.numel() for x in outs)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="coefficients wanted"):
        LinearMerge([[x], [x]], [x], [0.5])
    with pytest.raises(ValueError, match="equal shapes, contiguous"):
        LinearMerge([[x], [x.T[:2]]], [x], [0.5, 0.5])
    with pytest.raises(ValueError, match="denominator of 7/10"):
        LinearMerge([[x], [x]], [x], [Fraction(7, 10), 0.3])
    with pytest.raises(ValueError, match="models of"):
        LinearMerge([[x], [x, x]], [x], [0.5, 0.5])
