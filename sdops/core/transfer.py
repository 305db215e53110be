"""Portions on their way to a device and back, for the Sources that compute on one.

Disk, copies and kernels overlap, because every thread of a run has a stream of its own: while one reads, the others'
portions are sent, computed and fetched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdops.core import accel

PORTION = 1 << 24  # elements sent at once: 32 MB of halves
SMALL = 1 << 18  # elements below which the CPU is done before a GPU has begun


class Transfer:
    """The device, and each thread's stream and page-locked buffers.

    Args:
        device: `cuda`, or `cpu` to test the way through it.

    Attributes:
        kernels: The package that computes there.
        portion: Elements that are sent at once.
        small: Tensors of fewer elements stay with the CPU.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.kernels = accel.kernels()
        self.portion = PORTION
        self.small = SMALL
        self._room = _Room(self.device)

    def stream(self) -> Any:
        """A context in which copies and kernels go to this thread's stream."""
        return torch.cuda.stream(self._room.stream)  # does nothing without one

    def send(self, name: str, dtype: torch.dtype, count: int, read: Callable[[memoryview], None]) -> Tensor:
        """Elements that `read` puts into a buffer of that name, on the device.

        The copy may be under way when this returns: use the tensor in `stream()`, and fetch something that was made of
        it before the name is used again.
        """
        host = self._room.host(name, count * dtype.itemsize)
        read(memoryview(host.numpy().data))
        return host.view(dtype).to(self.device, non_blocking=True)

    def fetch(self, made: Tensor, buffer: memoryview) -> None:
        """Copy a contiguous tensor's bytes from the device."""
        host = self._room.host("out", len(buffer))
        host.copy_(made.view(-1).view(torch.uint8))
        buffer[:] = host.numpy().data


class _Room(threading.local):
    """A thread's own."""

    def __init__(self, device: torch.device) -> None:
        make: Any = torch.cuda.Stream
        self.stream = make(device) if device.type == "cuda" else None
        self._pinned = device.type == "cuda"
        self._buffers: dict[str, Tensor] = {}

    def host(self, name: str, size: int) -> Tensor:
        """The first bytes of a buffer, grown as needed."""
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buffers[name][:size]
