"""Whether kernels are right, before they are timed: against float64 or the torch functions, on ragged shapes, twice.

Results go into memory full of NaN. What is wrong is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import sdops_kernels as kernels
import torch
from bench import FAILURES, Bench
from sdops_kernels import reference
from sdops_kernels.lora_linear import backward_by_kernel, forward_by_kernel
from torch import Tensor

NEAR_TIES = 1e-3  # share of elements that products summed in another order may round to the other neighbour
RAGGED = ((70, 33), (64, 128), (96, 48))
HALVES = (torch.float16, torch.bfloat16)


def gate(bench: Bench) -> set[str]:
    """The stages whose kernels are right; what was found goes into the facts."""
    checks: dict[str, tuple[Callable[[Bench], bool], ...]] = {
        "bake": (_bakes, _gains),
        "merge": (_sums, _sparse_sums, _products_of_models),
        "linear": (_linear,),
        "factors": (_factors,),
        "step": (_linear,),
    }
    found: dict[str, bool] = {}
    for own in checks.values():
        for check in own:
            name = check.__name__.strip("_")
            if name not in found:
                try:
                    found[name] = check(bench)
                except FAILURES as error:  # a kernel that does not run is wrong; the others are timed
                    found[name] = False
                    bench.facts[f"{name}_error"] = f"{type(error).__name__}: {error}"[:500]
    passed = {stage for stage, own in checks.items() if all(found[check.__name__.strip("_")] for check in own)}
    bench.facts |= {"checks": found, "correct": sorted(passed)}
    bench.save()
    return passed


def _poisoned(like: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(x, float("nan")) for x in like]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def _bakes(bench: Bench) -> bool:
    """Elements that torch on the CPU rounds otherwise, and the same bits twice; for all dtypes."""
    right, worst = True, 0.0
    for base, factor in [(base, factor) for base in HALVES for factor in (*HALVES, torch.float32)]:
        weights = [bench.normal(*shape, dtype=base, scale=0.03) for shape in RAGGED]
        changes: list[list[kernels.Change]] = [
            [kernels.LoRA(*(bench.normal(*s, dtype=factor, scale=0.1) for s in ((o, 5), (5, i))), 0.5)]
            for o, i in RAGGED
        ]
        changes[2].append(kernels.LoKr(bench.normal(8, 6, scale=0.1), bench.normal(12, 8, scale=0.1), 0.5))
        outs = [_poisoned(weights) for _ in range(2)]
        for own in outs:
            kernels.Bake(weights, own, changes).run()
        on_cpu = [weight.cpu() for weight in weights]
        wanted = _poisoned(on_cpu)
        kernels.Bake(on_cpu, wanted, _on_cpu(changes)).run()
        wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(outs[0], wanted, strict=True))
        worst = max(worst, wrong / sum(map(prod, RAGGED)))
        right &= _equal(*outs)
    bench.facts["bake_wrong_share"] = worst
    return right and worst <= NEAR_TIES


def _on_cpu(changes: list[list[kernels.Change]]) -> list[list[kernels.Change]]:
    """The same for torch on the CPU, whose float32 products are summed in another order, and rounded once, too."""
    return [
        [
            replace(own, **{name: value.cpu() for name, value in vars(own).items() if isinstance(value, Tensor)})
            for own in each
        ]
        for each in changes
    ]


def _gains(bench: Bench) -> bool:
    weights = [bench.normal(*shape, scale=0.03) for shape in RAGGED]
    changes = [kernels.LoRA(bench.normal(o, 5, scale=0.1), bench.normal(5, i, scale=0.1), 0.5) for o, i in RAGGED]
    magnitudes = [torch.ones(len(weight), device=bench.device) for weight in weights]
    found = [kernels.dora_gains(weights, changes, magnitudes) for _ in range(2)]
    right = _equal(*found)
    for gain, weight, change in zip(found[0], weights, changes, strict=True):
        exact = 1 / (weight.double() + change.up.double() @ change.down.double() * change.scale).norm(dim=1)
        right &= bool(torch.allclose(gain.double(), exact, rtol=1e-5))
    return right


def _sums(bench: Bench) -> bool:
    """The bytes of the CPU, for two, three and eight models."""
    right = True
    for dtype in (*HALVES, torch.float32):
        for count in (2, 3, 8):
            models = [[bench.normal(*shape, dtype=dtype, scale=0.03) for shape in RAGGED] for _ in range(count)]
            weights = [1 - 0.1 * (count - 1), *([0.1] * (count - 1))]
            outs = [_poisoned(models[0]) for _ in range(2)]
            for own in outs:
                kernels.LinearMerge(models, own, weights).run()
            wanted = [
                reference.linear_merge([model[place].cpu() for model in models], weights, dtype)[0]
                for place in range(len(RAGGED))
            ]
            right &= _equal(*outs) and _equal(outs[0], wanted)
    return right


def _sparse_sums(bench: Bench) -> bool:
    models = [[bench.normal(*shape, scale=0.03) for shape in RAGGED] for _ in range(3)]
    keys = [[(place, model) for model in range(2)] for place in range(len(RAGGED))]
    right = True
    for method in ("ties", "dare_linear", "dare_ties"):
        outs = [_poisoned(models[0]) for _ in range(3)]
        for own, backend in zip(outs, (None, None, "torch"), strict=True):
            kernels.SparseMerge(method, models[0], models[1:], own, density=0.3, keys=keys, backend=backend).run()
        right &= _equal(outs[0], outs[1]) and _equal(outs[0], outs[2])
    return right


def _products_of_models(bench: Bench) -> bool:
    models = [[bench.normal(*shape) for shape in RAGGED] for _ in range(3)]
    found = [kernels.inner_products(models) for _ in range(2)]
    exact = torch.stack([reference.inner_products([model[place] for model in models]).cpu() for place in range(3)])
    return torch.equal(*found) and bool(torch.allclose(found[0], exact, rtol=1e-12, atol=1e-9))


def _linear(bench: Bench) -> bool:
    """Both kernels against float64, both dtypes; gradients have the same bits twice."""
    right = True
    forward, backward = forward_by_kernel, backward_by_kernel
    if not bench.on_gpu:
        forward, backward = reference.lora_forward, reference.lora_backward
    for dtype in HALVES:
        sizes = ((600, 96), (80, 96), (7, 96), (80, 7), (600, 80))
        given = [bench.normal(*size, dtype=dtype, scale=0.1) for size in sizes]
        x, weight, down, up, gradient = given
        result, inner = forward(x, weight, None, down, up, 0.5)
        again = forward(x, weight, None, down, up, 0.5)
        grads = [backward(gradient, x, weight, inner, down, up, 0.5) for _ in range(2)]
        x, weight, down, up, gradient = (part.double() for part in given)
        wanted = reference.lora_forward(x, weight, None, down, up, 0.5)
        exact = (*wanted, *reference.lora_backward(gradient, x, weight, wanted[1], down, up, 0.5))
        for own, best in zip((result, inner, *grads[0]), exact, strict=True):
            error = (own.double() - best).abs().max() / best.abs().max()
            right &= float(error) <= 4 * torch.finfo(dtype).eps
        right &= _equal([result, inner], list(again)) and _equal(list(grads[0]), list(grads[1]))
    return right


def _factors(bench: Bench) -> bool:
    matrix = bench.normal(96, 64, dtype=torch.float32)
    found = kernels.low_rank([matrix], 8)[0]
    best = torch.linalg.svdvals(matrix.double())[8:].square().sum().sqrt()
    return float((matrix.double() - found.up.double() @ found.down.double()).norm()) <= 1.001 * float(best)
