"""One linear layer with a LoRA in training: device time from a graph over rotating buffers, and wall time eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sdops_kernels as kernels
import shapes
import torch
from bench import Bench
from timing import as_graph
from torch import Tensor

CALLS = 50  # in a graph
ROTATED = 256 << 20  # bytes of inputs and weights that the calls of a graph go round, so that no cache holds them
RANKS = (16, 64, 8, 32, 128)
Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, weight, down, up, gradient


def run(bench: Bench) -> None:
    """All shapes of SD1.5 at 512 and of SDXL at 1024 pixels, batch 1."""
    choices = kernels.Choices()
    for rank in RANKS[:1] if bench.dry else RANKS:
        for model in ("tiny",) if bench.dry else ("sdxl", "sd15"):
            for tokens, inputs, outputs in shapes.LINEARS[model]:
                if bench.late:
                    bench.note(
                        f"{model} from {tokens}x{inputs}x{outputs} rank {rank} on", "ours", skipped="no time left"
                    )
                    choices.save(bench.folder / "choices.json")
                    return
                _shape(
                    bench, choices, f"{model} {tokens}x{inputs}x{outputs} rank {rank}", tokens, inputs, outputs, rank
                )
    choices.save(bench.folder / "choices.json")


def _shape(
    bench: Bench, choices: kernels.Choices, case: str, tokens: int, inputs: int, outputs: int, rank: int
) -> None:
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    size = 2 * (tokens * (inputs + outputs) + inputs * outputs)
    copies = 1 if bench.dry else max(1, min(CALLS, -(-ROTATED // size)))
    layers = [_layer(bench, dtype, tokens, inputs, outputs, rank) for _ in range(copies)]
    if bench.on_gpu:
        choices.measure([(tokens, inputs, outputs, rank)], dtype, bench.device)
        bench.note(case, "ours", chosen=dict(zip(("forward", "backward"), _chosen(choices, layers[0]), strict=True)))
    forward_floor = bench.flops_ms(2 * tokens * outputs * inputs)
    for arm, forward in _arms(bench, choices, rank).items():

        def both(layer: Layer, forward: Callable[[Layer], Tensor] = forward) -> Any:
            x, _, down, up, gradient = layer
            return torch.autograd.grad(forward(layer), [x, down, up], gradient, allow_unused=True)

        for name, work, floor in (
            ("forward", lambda layer, f=forward: f(layer).detach(), forward_floor),
            ("forward + backward", both, 2 * forward_floor),
        ):
            bench.time(f"{case} {name}, wall", arm, lambda work=work: [work(layer) for layer in layers], calls=copies)
            calls = CALLS if bench.on_gpu else 1
            graph = bench.made(f"{case} {name}", arm, lambda work=work, calls=calls: _graph(bench, work, layers, calls))
            if graph:
                bench.time(f"{case} {name}", arm, graph, floor, calls=calls)
            del graph


def _layer(bench: Bench, dtype: torch.dtype, tokens: int, inputs: int, outputs: int, rank: int) -> Layer:
    x, weight, down, up, gradient = (
        bench.normal(*size, dtype=dtype, scale=0.1)
        for size in ((tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (tokens, outputs))
    )
    for part in (x, down, up):
        part.requires_grad_()
    return x, weight, down, up, gradient


def _chosen(choices: kernels.Choices, layer: Layer) -> tuple[bool, bool]:
    x, weight, down, *_ = layer
    return choices.fused(x, (len(x), x.shape[1], len(weight), len(down)))


def _graph(bench: Bench, work: Callable[[Layer], Any], layers: list[Layer], calls: int) -> Callable[[], Any]:
    def rounds() -> None:
        for call in range(calls):
            work(layers[call % len(layers)])

    return as_graph(rounds, bench.device)


def _arms(bench: Bench, choices: kernels.Choices, rank: int) -> dict[str, Callable[[Layer], Tensor]]:
    def peft(layer: Layer) -> Tensor:
        x, weight, down, up, _ = layer
        return torch.nn.functional.linear(x, weight) + ((x @ down.T) @ up.T) * 0.5

    def frozen(layer: Layer) -> Tensor:
        return torch.nn.functional.linear(layer[0], layer[1])

    def unsloth(layer: Layer) -> Tensor:
        x, weight, down, up, _ = layer
        return torch.addmm(torch.mm(x, weight.T), torch.mm(x, down.T), up.T, alpha=0.5)

    def ours(layer: Layer, choices: kernels.Choices | None = choices) -> Tensor:
        x, weight, down, up, _ = layer
        return kernels.lora_linear(x, weight, None, down, up, 0.5, choices=choices)

    arms: dict[str, Callable[[Layer], Tensor]] = {
        "frozen layer alone": frozen,
        "ours": ours,
        "ours, plain": lambda layer: ours(layer, None),
        "PEFT order": peft,
        "Unsloth style": unsloth,
    }
    if bench.on_gpu and rank == RANKS[0]:  # compiling takes seconds a shape
        arms["torch.compile of PEFT order"] = torch.compile(peft)
    if lycoris := _lycoris():
        arms["LyCORIS bypass"] = lycoris
    return arms


def _lycoris() -> Callable[[Layer], Tensor] | None:
    """LyCORIS' own function beside the frozen layer, where it is installed."""
    try:
        from lycoris.functional.locon import bypass_forward_diff
    except ImportError:
        return None

    def work(layer: Layer) -> Tensor:
        x, weight, down, up, _ = layer
        result = torch.nn.functional.linear(x, weight)
        return result + bypass_forward_diff(x, result, down, up, gamma=0.5)

    return work
