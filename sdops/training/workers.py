"""Several processes on several GPUs or machines: each has its part of a batch, gradients are averaged once a step.

Started by `torchrun`, which says to each process which one it is. Two processes at batch B do what one does at 2 B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdops import settings


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among all.

    Attributes:
        rank: Its number, from 0; the first one writes and talks.
        size: How many there are.
        local: Its number on this machine, hence of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    def average(self, gradient: Tensor) -> None:
        """Replace the gradient by the mean over all processes: one operation for everything that learns."""
        if self.size > 1:
            torch.distributed.all_reduce(gradient)
            gradient.div_(self.size)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
            value.div_(self.size)
        return value

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Part from the others."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def join(device: torch.device) -> Workers:
    """Meet the other processes, if `torchrun` started some."""
    launched = settings.launched()
    if launched is None:
        return Workers()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(torch.distributed.get_rank(), torch.distributed.get_world_size(), launched[1])
