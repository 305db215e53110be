"""LoRA layers through `sdops_kernels` on a GPU: its kernels take over where a measurement there finds them faster."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sdops.core import accel


class LoraLinear:
    """y = x W^T + bias + s (x A^T) B^T; each shape is measured when it is seen first, which takes a second.

    Args:
        package: `sdops_kernels`.
        errors: What a kernel that does not work here raises.
    """

    def __init__(self, package: Any, errors: tuple[type[Exception], ...]) -> None:
        self._package, self._errors = package, errors
        self._choices = package.Choices()
        self._seen: set[tuple[torch.dtype, int, int, int, int]] = set()

    def __call__(self, x: Tensor, layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """[..., K] -> [..., N]."""
        shape = (x.numel() // x.shape[-1], x.shape[-1], len(up), len(down))
        if (x.dtype, *shape) not in self._seen and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._seen.add((x.dtype, *shape))
            self._measure(shape, x)
        found: Tensor = self._package.lora_linear(x, layer.weight, layer.bias, down, up, scale, choices=self._choices)
        return found

    def _measure(self, shape: tuple[int, int, int, int], x: Tensor) -> None:
        try:
            self._choices.measure([shape], x.dtype, str(x.device))
        except self._errors as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"kernels do not work for LoRA layers of {shape}, torch computes them: {told}", stacklevel=2)


def lora_linear(device: torch.device) -> LoraLinear | None:
    """What computes LoRA layers there; None where there are no kernels: then torch does it."""
    if device.type != "cuda" or find_spec("sdops_kernels") is None or find_spec("triton") is None:
        return None
    return LoraLinear(accel.kernels(), (RuntimeError, import_module("triton.errors").TritonError))
