"""Merges of whole models: linear ones, TIES, DARE, slerp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sdops_kernels as kernels
import shapes
import torch
from bench import Bench
from torch import Tensor

Models = list[list[Tensor]]
COMPILED = 30  # layers that torch.compile gets


def run(bench: Bench) -> None:
    """Two, three and eight models."""
    name = "tiny" if bench.dry else "sdxl"
    sizes = shapes.matrices(getattr(shapes, name.upper()))
    numel = sum(o * i for o, i in sizes)
    for count in (3, 2, 8):
        if not bench.fits(2 * numel * (count + 1)):
            bench.note(f"{name} weighted sum of {count}", "ours exact", skipped="not enough memory")
            continue
        models = [[bench.normal(*size, scale=0.03) for size in sizes] for _ in range(count)]
        outs = [torch.empty_like(x) for x in models[0]]
        weights = [Fraction(1) - (count - 1) * Fraction(7, 64), *([Fraction(7, 64)] * (count - 1))]
        _linear(bench, f"{name} weighted sum of {count}", models, outs, weights)
        if count == 3:
            _linear(bench, f"{name} add difference", models, outs, [1.0, 0.7, -0.7])
            _sparse(bench, name, models, outs, numel)
            _spherical(bench, f"{name} slerp", models[:2], outs, numel)
        del models, outs


def _linear(bench: Bench, case: str, models: Models, outs: list[Tensor], weights: Sequence[Fraction | float]) -> None:
    floor = bench.bytes_ms(2 * (len(models) + 1) * sum(x.numel() for x in outs))
    for arm, exact in (("ours exact", True), ("ours fast", False)):
        plan = kernels.LinearMerge(models, outs, weights, exact=exact)
        bench.time(case, arm, plan.launch if plan.backend == "triton" else plan.run, floor)
        if exact:
            bench.time(case, "ours exact, checked", plan.run, floor)
    floats = [float(weight) for weight in weights]
    bench.time(case, "eager half", lambda: _eager(models, outs, floats, None), floor)
    bench.time(case, "eager float32", lambda: _eager(models, outs, floats, torch.float32), floor)
    if bench.on_gpu and len(models) == 3:
        few, part = [model[:COMPILED] for model in models], f"{case}, {COMPILED} layers"
        compiled = torch.compile(_eager)
        floor = bench.bytes_ms(2 * (len(models) + 1) * sum(x.numel() for x in few[0]))
        bench.time(part, "torch.compile", lambda: compiled(few, outs[:COMPILED], floats, torch.float32), floor)
        plan = kernels.LinearMerge(few, outs[:COMPILED], weights)
        bench.time(part, "ours exact", plan.launch, floor)


def _eager(models: Models, outs: list[Tensor], weights: list[float], dtype: torch.dtype | None) -> None:
    for place, out in enumerate(outs):
        total = models[0][place].to(dtype or out.dtype) * weights[0]
        for model, weight in zip(models[1:], weights[1:], strict=True):
            total = total + model[place].to(total.dtype) * weight
        out.copy_(total)


def _sparse(bench: Bench, name: str, models: Models, outs: list[Tensor], numel: int) -> None:
    """Of two models and their base; TIES reads everything four times for its borders and once more to merge."""
    keys = [[(place, model) for model in range(2)] for place in range(len(outs))]
    eager: dict[str, Callable[[], Any]] = {
        "ties": lambda: _eager_ties(models, outs),
        "dare_linear": lambda: _eager_dare(models, outs),
    }
    for method, passes in (("ties", 5), ("dare_linear", 1)):
        plan = kernels.SparseMerge(method, models[0], models[1:], outs, density=0.3, keys=keys)
        floor = bench.bytes_ms((6 * passes + 2) * numel)
        bench.time(f"{name} {method} of 2", "ours", plan.run, floor)
        bench.time(f"{name} {method} of 2", "eager float32", eager[method], floor)


def _eager_ties(models: Models, outs: list[Tensor]) -> None:
    for place, out in enumerate(outs):
        base = models[0][place].float()
        kept = []
        for model in models[1:]:
            change = model[place].float() - base
            border = change.abs().flatten().kthvalue(max(1, int(0.7 * change.numel()))).values
            kept.append(torch.where(change.abs() > border, change, 0))
        sign = torch.sign(sum(kept))
        out.copy_(base + sum(torch.where(change * sign > 0, change, 0) for change in kept))


def _eager_dare(models: Models, outs: list[Tensor]) -> None:
    for place, out in enumerate(outs):
        base = models[0][place].float()
        changes = [model[place].float() - base for model in models[1:]]
        out.copy_(base + sum(torch.where(torch.rand_like(own) < 0.3, own, 0) / 0.3 for own in changes))


def _spherical(bench: Bench, case: str, models: Models, outs: list[Tensor], numel: int) -> None:
    """slerp: inner products, coefficients on the CPU, sums."""
    floor = bench.bytes_ms(2 * (2 + 3) * numel)

    def ours() -> None:
        gram = kernels.inner_products(models)
        angle = torch.arccos((gram[:, 0, 1] / (gram[:, 0, 0] * gram[:, 1, 1]).sqrt()).clamp(-1, 1))
        weights = torch.stack([(0.7 * angle).sin(), (0.3 * angle).sin()], 1) / angle.sin()[:, None]
        kernels.LinearMerge(models, outs, weights.tolist()).run()

    def eager() -> None:
        for one, other, out in zip(*models, outs, strict=True):
            a, b = one.float(), other.float()
            angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
            out.copy_(((0.7 * angle).sin() * a + (0.3 * angle).sin() * b) / angle.sin())

    bench.time(case, "ours", ours, floor)
    bench.time(case, "eager float32", eager, floor)
