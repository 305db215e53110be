"""Work recorded as one CUDA graph per shape of the batch: thousands of launches become one.

At batch 1 a step of SDXL is some 10,000 kernels, and launching them takes longer than running them. Forward, backward,
clipping and the optimizer are recorded once for each shape and replayed; inputs are copied into the tensors that were
recorded. Nothing in a step asks the device for a number, so nothing waits. Where gradients are joined after the
backward pass (accumulation, several processes), only forward and backward are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdops.training.feeder import Batch

_WARM = 3  # runs before recording, so that libraries have chosen their algorithms and allocated their buffers

_Key = tuple[tuple[str, tuple[int, ...]], ...]


class Graphs:
    """Work on a batch that is recorded for each shape and replayed.

    Args:
        work: What to do with a batch; returns a loss.
        state: What the work changes; it is put back after the runs that only warm up.
        note: Told once if it cannot be recorded; from then on the work is done launch by launch.
    """

    def __init__(self, work: Callable[[Batch], Tensor], state: Sequence[Tensor], note: Callable[[str], None]) -> None:
        self._work, self._state, self._note = work, state, note
        self._recorded: dict[_Key, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self._pool: Any = None
        self._failed = False

    def __call__(self, batch: Batch) -> Tensor:
        """Do the work; the loss is overwritten by the next call."""
        given = batch.tensors()
        key = tuple((name, tuple(value.shape)) for name, value in given.items())
        if key not in self._recorded and not self._failed:
            self._try(key, batch)
        if self._failed:
            return self._work(batch)
        graph, inputs, loss = self._recorded[key]
        for name, value in inputs.tensors().items():
            value.copy_(given[name])
        graph.replay()
        return loss

    def _try(self, key: _Key, batch: Batch) -> None:
        """Record; what warming up changed is put back whether it worked or not."""
        kept = [value.detach().clone() for value in self._state]
        devices = [batch.latents.device] if batch.latents.is_cuda else []
        try:
            with torch.random.fork_rng(devices):  # dropout begins where it would have begun
                self._recorded[key] = self._record(batch)
        except RuntimeError as error:
            self._failed = True
            self._recorded.clear()
            told = str(error).splitlines()[0]
            self._note(f"CUDA cannot record the step, so steps are launched one by one, which is slower: {told}")
        with torch.no_grad():
            for value, before in zip(self._state, kept, strict=True):
                value.copy_(before)

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor]:
        inputs = batch.copied()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self._work(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._work(inputs)
        self._pool = self._pool or graph.pool()
        return graph, inputs, loss


def why_not(device: torch.device, *, repeats: bool, dropout: bool, checkpointing: bool) -> str:
    """Why a step cannot be recorded; nothing if it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not repeats:
        return "the method's steps are not alike"
    if dropout and checkpointing:
        return "with dropout, checkpointing has to look up the state of the random numbers"
    return ""
