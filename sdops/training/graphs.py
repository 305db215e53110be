"""The whole step as one CUDA graph per shape of the batch: thousands of launches become one.

At batch 1 a step of SDXL is some 10,000 kernels, and launching them takes longer than running them. Forward, backward,
clipping and the optimizer are recorded once for each shape and replayed; inputs are copied into the tensors that were
recorded. Nothing in a step asks the device for a number, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdops.training.feeder import Batch

_WARM = 3  # steps before recording, so that libraries have chosen their algorithms and allocated their buffers


class Graphs:
    """A step that is recorded for each shape and replayed.

    Args:
        step: Computes a whole optimizer step of a batch and returns its loss.
        state: What the step changes; it is put back after the steps that only warm up.
    """

    def __init__(self, step: Callable[[Batch], Tensor], state: list[Tensor]) -> None:
        self._step, self._state = step, state
        self._recorded: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step."""
        key = tuple((name, tuple(value.shape)) for name, value in batch.tensors().items())
        if key not in self._recorded:
            self._record(key, batch)
        graph, inputs, loss = self._recorded[key]
        given = batch.tensors()
        for name, value in inputs.tensors().items():
            value.copy_(given[name])
        graph.replay()
        return loss

    def _record(self, key: tuple[tuple[str, tuple[int, ...]], ...], batch: Batch) -> None:
        inputs = batch.copied()
        kept = [value.detach().clone() for value in self._state]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self._step(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._step(inputs)
        self._pool = self._pool or graph.pool()
        with torch.no_grad():
            for value, before in zip(self._state, kept, strict=True):
                value.copy_(before)
        self._recorded[key] = graph, inputs, loss


def why_not(device: torch.device, *, accumulate: int, ranks: int, dropout: float, checkpointing: bool) -> str:
    """Why a step cannot be recorded; nothing if it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if accumulate > 1:
        return "gradients are accumulated"
    if ranks > 1:
        return "several processes share the work"
    if dropout:
        return "dropout draws new numbers in every step"
    if checkpointing:
        return "checkpointing keeps the state of the random numbers"
    return ""
