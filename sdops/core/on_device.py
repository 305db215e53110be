"""Merges on a GPU: disk, copies and kernels overlap, because every thread of a run has a stream of its own.

A thread reads a portion of the inputs into page-locked memory, sends it, computes and fetches the result; meanwhile the
others do the same with other portions. What is too small to pay for that is computed by the CPU: linear merges have the
same bits on both, so it does not matter who does which.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdops.core import accel
from sdops.core.inputs import nonfinite, read_raw
from sdops.core.linear import coefficients
from sdops.core.merged import Merged
from sdops.core.method import Method
from sdops.core.noise import key_words
from sdops.core.plan import Plan, Step
from sdops.core.precision import FORMATS, count_nonfinite
from sdops.core.retained import SAMPLE
from sdops.core.stream import TORCH_DTYPES
from sdops.errors import FormatError, UsageError

PORTION = 1 << 24  # elements sent at once: 32 MB of halves
SMALL = 1 << 18  # elements below which the CPU is done before a GPU has begun
SPARSE = ("dare_linear", "dare_ties", "ties")  # beside the linear ones


def check_method(method: str, execution: str) -> None:
    """Refuse methods that have no kernel.

    Raises:
        UsageError: the method is one of them.
    """
    if execution != "linear" and method not in SPARSE:
        raise UsageError(
            f"`{method.replace('_', '-')}` has no kernel for the GPU",
            hint=f"leave out `--device`; linear methods have one, and {', '.join(n.replace('_', '-') for n in SPARSE)}",
        )


class MergedOnDevice(Merged):
    """As Merged, with large tensors merged on a device.

    Args:
        plan, method, seed, memory: As for Merged.
        device: `cuda`, or `cpu` to test the way through it.
    """

    def __init__(self, plan: Plan, method: Method, *, device: str, seed: int = 0, memory: int = 1 << 30) -> None:
        super().__init__(plan, method, seed=seed, memory=memory)
        check_method(method.name, method.execution)
        self.device = torch.device(device)
        self._kernels = accel.kernels()
        self._room = Room(self.device)
        self.small = SMALL
        self.portion = PORTION

    @property
    def forks(self) -> bool:
        """A device belongs to one process."""
        return False

    def piece_bytes(self, key: str) -> int:
        """Portions that are sent; sparse methods need whole tensors."""
        step = self.plan.steps[key]
        if not self._is_sent(step):
            return super().piece_bytes(key)
        if self.method.execution != "linear":
            return step.spec.nbytes
        return self.portion * (step.spec.nbytes // step.spec.numel)

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        if self._is_sent(self.plan.steps[key]) and self.method.execution != "linear":
            return False
        return super().splits(key)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Compute bytes `[start, start + len(buffer))` of a tensor.

        Raises:
            FormatError: an input holds NaN or infinity.
        """
        step = self.plan.steps[key]
        whole = self.method.execution == "linear" or len(buffer) == step.spec.nbytes
        if not self._is_sent(step) or not whole:
            super().read_into(key, start, buffer)
            return
        raw = FORMATS[step.spec.dtype].raw
        size = np.dtype(raw).itemsize
        with self._room.stream():
            inputs = self._send(step, start // size, len(buffer) // size)
            out = torch.empty(len(buffer) // size, dtype=TORCH_DTYPES[step.spec.dtype], device=self.device)
            try:
                self._merge(key, step, inputs, out)
            except ValueError:
                self._explain(key, step, start // size, len(out))
                raise
            fetched = self._room.host("out", len(buffer))
            fetched.copy_(out.view(torch.uint8))
            buffer[:] = fetched.numpy().data
        if start == 0 and self.retained.wants(key) and self.method.execution == "linear":
            self._sample(step, np.frombuffer(buffer, raw)[:SAMPLE])

    def _is_sent(self, step: Step) -> bool:
        narrow = step.spec.dtype in TORCH_DTYPES and all(item.spec.dtype in TORCH_DTYPES for item in step.inputs)
        doubles = "F64" in (step.spec.dtype, *(item.spec.dtype for item in step.inputs))
        one = self.method.execution == "linear" or len({item.spec.dtype for item in step.inputs}) == 1
        return step.action == "merge" and step.spec.numel >= self.small and narrow and not doubles and one

    def _send(self, step: Step, first: int, count: int) -> list[Tensor]:
        """Elements [first, first + count) of all inputs, on the device."""
        sent = []
        for place, item in enumerate(step.inputs):
            dtype = TORCH_DTYPES[item.spec.dtype]
            host = self._room.host(f"in{place}", count * dtype.itemsize)
            item.source.read_into(item.key, first * dtype.itemsize, host.numpy().data)
            sent.append(host.view(dtype).to(self.device, non_blocking=True))
        return sent

    def _merge(self, key: str, step: Step, inputs: list[Tensor], out: Tensor) -> None:
        """Raises ValueError if an input holds NaN or infinity."""
        if self.method.execution == "linear":
            exact = coefficients(self.method.function, len(inputs), step.knobs)
            merged = self._kernels.LinearMerge([[x] for x in inputs], [out], exact).run()
            self._count(key, sum(merged.clamped.values()))
            return
        base, models = inputs[0], inputs[1:]
        knobs: dict[str, Any] = {"density": 0.2, "min_numel": 0} if self.method.name == "ties" else {"density": 0.5}
        knobs |= {"weights": (), "scale": 1.0, "normalize": self.method.name == "ties"} | dict(step.knobs)
        density = 1.0 if out.numel() < knobs.get("min_numel", 0) else knobs["density"]
        keys = [[key_words(self._seed, key, model, 0) for model in range(len(models))]]
        self._kernels.SparseMerge(
            self.method.name,
            [base],
            [[x] for x in models],
            [out],
            density=density,
            weights=knobs["weights"],
            scale=knobs["scale"],
            normalize=knobs["normalize"],
            keys=keys,
        ).run()

    def _explain(self, key: str, step: Step, first: int, count: int) -> None:
        """Raises FormatError for the input that holds NaN or infinity, or for the result that does."""
        for item in step.inputs:
            nan, infinite = count_nonfinite(read_raw(item, first, count), item.spec.dtype)
            if nan or infinite:
                raise nonfinite(item, nan, infinite)
        raise FormatError(f"`{self.method.name}` made values of `{key}` that are not finite", hint="change the knobs")

    def _sample(self, step: Step, out: np.ndarray[Any, Any]) -> None:
        exact = coefficients(self.method.function, len(step.inputs), step.knobs)
        weights = {place: weight for place, weight in enumerate(exact) if weight}
        raws: Sequence[Any] = [read_raw(item, 0, len(out)) for item in step.inputs]
        self.retained.sample_linear(step, raws, weights, out)


class Room(threading.local):
    """A thread's stream and page-locked buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        make: Any = torch.cuda.Stream
        self._own = make(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}

    def stream(self) -> Any:
        """A context in which copies and kernels go to this thread's stream."""
        return torch.cuda.stream(self._own)  # does nothing without one

    def host(self, name: str, size: int) -> Tensor:
        """The first bytes of a buffer, grown as needed."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._buffers[name][:size]
