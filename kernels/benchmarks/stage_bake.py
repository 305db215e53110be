"""LoRAs into all layers of a model: one launch of ours, and what people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sdops_kernels as kernels
import shapes
import torch
from bench import Bench
from timing import as_graph
from torch import Tensor

Factors = list[list[tuple[Tensor, Tensor]]]  # [LoRAs][layers]: up, down
CASES = ((16, 1), (16, 4), (4, 1), (64, 1), (128, 1))  # rank, number of LoRAs
COMPILED = 30  # layers that torch.compile gets: it takes minutes to trace all


def run(bench: Bench) -> None:
    """All models, ranks and arms."""
    for model in ("tiny",) if bench.dry else ("sdxl", "sd15"):
        sizes = shapes.matrices(getattr(shapes, model.upper()))
        weights = [bench.normal(*size, scale=0.03) for size in sizes]
        outs = [torch.empty_like(weight) for weight in weights]
        for rank, count in CASES:
            factors = [
                [(bench.normal(o, rank, scale=0.01), bench.normal(rank, i)) for o, i in sizes] for _ in range(count)
            ]
            _case(bench, f"{model} rank {rank} x {count}", weights, outs, factors)
            if (rank, count) == (16, 1):
                _families(bench, model, weights, outs, factors)
                _modules(bench, f"{model} rank {rank} x {count}", sizes)


def _floor(bench: Bench, weights: list[Tensor], factors: Factors) -> float:
    moved = sum(4 * weight.numel() for weight in weights)
    return bench.bytes_ms(moved + sum(2 * (up.numel() + down.numel()) for own in factors for up, down in own))


def _plan(weights: list[Tensor], outs: list[Tensor], factors: Factors) -> kernels.Bake:
    changes = [
        [kernels.LoRA(*own[place], 0.5, slot=slot) for slot, own in enumerate(factors)] for place in range(len(weights))
    ]
    plan = kernels.Bake(weights, outs, changes)
    plan.run([1.0] * len(factors))
    return plan


def _work(plan: Any) -> Callable[[], Any]:
    """The launches alone; on a CPU there are none."""
    launch: Callable[[], Any] = plan.launch if plan.backend == "triton" else plan.run
    return launch


def _case(bench: Bench, case: str, weights: list[Tensor], outs: list[Tensor], factors: Factors) -> None:
    floor = _floor(bench, weights, factors)
    plan = _plan(weights, outs, factors)
    wrong = _wrong_share(weights, outs, factors)
    bench.time(case, "ours", _work(plan), floor, wrong=wrong)
    bench.time(case, "ours, other strengths", lambda: plan.run([0.7] * len(factors)), floor)
    addmm, peft = _addmm_loop(weights, outs, factors), _peft_order(weights, outs, factors)
    bench.time(case, "addmm loop", addmm, floor, wrong=lambda: _wrong_share(weights, outs, factors))
    if bench.on_gpu and (graph := bench.made(case, "addmm loop in a graph", lambda: as_graph(addmm, bench.device))):
        bench.time(case, "addmm loop in a graph", graph, floor)
    bench.time(case, "PEFT order", peft, floor, wrong=lambda: _wrong_share(weights, outs, factors))
    few = [own[:COMPILED] for own in factors]
    if bench.on_gpu:
        compiled = torch.compile(_peft_order(weights[:COMPILED], outs[:COMPILED], few))
        part = f"{case}, {COMPILED} layers"
        bench.time(part, "torch.compile", compiled, _floor(bench, weights[:COMPILED], few))
        bench.time(part, "ours", _work(_plan(weights[:COMPILED], outs[:COMPILED], few)))


def _wrong_share(weights: list[Tensor], outs: list[Tensor], factors: Factors) -> float:
    """Share of a layer's elements that are not float64's sum, rounded once."""
    place = min(range(len(weights)), key=lambda i: weights[i].numel())
    exact = weights[place].double() + sum(0.5 * own[place][0].double() @ own[place][1].double() for own in factors)
    distance = (outs[place].double() - exact).abs()
    best = torch.stack([_neighbour(outs[place], end).double() for end in (float("inf"), -float("inf"))])
    return float(((best - exact).abs() < distance).any(0).double().mean())


def _neighbour(values: Tensor, end: float) -> Tensor:
    """The next number of the dtype."""
    return torch.nextafter(values.cpu(), torch.full_like(values, end, device="cpu")).to(values.device)


def _addmm_loop(weights: list[Tensor], outs: list[Tensor], factors: Factors) -> Callable[[], None]:
    def work() -> None:
        for place, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            source = weight
            for own in factors:
                torch.addmm(source, *own[place], alpha=0.5, out=out)
                source = out

    return work


def _peft_order(weights: list[Tensor], outs: list[Tensor], factors: Factors) -> Callable[[], None]:
    """delta = (B A) s, W += delta: three roundings per LoRA, as PEFT's merge does it, without its modules."""

    def work() -> None:
        for place, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            out.copy_(weight)
            for own in factors:
                out += (own[place][0] @ own[place][1]) * 0.5

    return work


def _families(bench: Bench, model: str, weights: list[Tensor], outs: list[Tensor], factors: Factors) -> None:
    """DoRA and its norms, and LoKr."""
    floor, case = _floor(bench, weights, factors), f"{model} rank 16, DoRA"
    loras = [kernels.LoRA(*own, 0.5) for own in factors[0]]
    magnitudes = [weight.float().norm(dim=1) for weight in weights]
    read = bench.bytes_ms(sum(2 * weight.numel() for weight in weights))
    bench.time(case, "ours, norms", lambda: kernels.dora_gains(weights, loras, magnitudes), read)
    gains = kernels.dora_gains(weights, loras, magnitudes)
    directed = [[kernels.LoRA(own.up, own.down, 0.5, gain=gain)] for own, gain in zip(loras, gains, strict=True)]
    plan = kernels.Bake(weights, outs, directed)
    bench.time(case, "ours", _work(plan), floor)

    def eager() -> None:
        for weight, out, own, size in zip(weights, outs, loras, magnitudes, strict=True):
            wide = weight.float() + own.up.float() @ own.down.float() * 0.5
            out.copy_(wide * (size / wide.norm(dim=1))[:, None])

    bench.time(case, "eager float32", eager, floor)
    krons = [
        [kernels.LoKr(bench.normal(8, 8, scale=0.1), bench.normal(len(w) // 8, w.shape[1] // 8, scale=0.1), 0.5)]
        for w in weights
    ]
    plan = kernels.Bake(weights, outs, krons)
    bench.time(f"{model} LoKr, factor 8", "ours", _work(plan), floor)


def _modules(bench: Bench, case: str, sizes: list[tuple[int, int]]) -> None:
    """The real modules of PEFT and LyCORIS, where their packages are installed."""

    def layers() -> torch.nn.Sequential:
        made = torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=False, dtype=torch.float16) for o, i in sizes))
        return made.to(bench.device)

    def peft(*, safe: bool) -> Callable[[], Any]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(layers(), LoraConfig(r=16, target_modules=[str(place) for place in range(len(sizes))]))
        tuned = [module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "lora_A")]

        def work() -> None:
            for module in tuned:
                module.merge(safe_merge=safe)
                module.merged_adapters.clear()  # so that the next one merges again

        return work

    def lycoris() -> Callable[[], Any]:
        from lycoris import LycorisNetwork, create_lycoris

        LycorisNetwork.apply_preset({"target_module": ["Linear"]})
        network = create_lycoris(layers(), 1.0, linear_dim=16, linear_alpha=16, algo="lora").to(bench.device)
        return lambda: [module.get_merged_weight() for module in network.loras]

    floor = bench.bytes_ms(sum(4 * o * i for o, i in sizes))
    for arm, make in (
        ("PEFT merge", lambda: peft(safe=False)),
        ("PEFT safe_merge (diffusers' fuse_lora)", lambda: peft(safe=True)),
        ("LyCORIS merged weights", lycoris),
    ):
        if work := bench.made(case, arm, make):
            bench.time(case, arm, work, floor)
