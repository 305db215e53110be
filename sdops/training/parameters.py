"""Everything that learns, in one flat float32 buffer: one gradient, one norm, one all-reduce, one optimizer step.

The tensors of a step are made of the buffer by one cast and one split, so that autograd joins all gradients in one
operation as well, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that learns.

    Attributes:
        name: Told in files and logs.
        initial: What it begins as, float32.
        lr: Its learning rate at full rate.
        weight_decay: Of AdamW.
        until: Steps after which it stands still; None = it learns to the end.
        since: Steps before which it stands still.
    """

    name: str
    initial: Tensor
    lr: float
    weight_decay: float = 0.0
    until: int | None = None
    since: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """A stretch of the buffer that learns alike."""

    start: int
    stop: int
    lr: float
    weight_decay: float
    until: int | None
    since: int

    @property
    def rests(self) -> bool:
        """Whether there are steps in which it stands still."""
        return self.lr == 0 or self.since > 0 or self.until is not None

    def learns(self, step: int) -> bool:
        """Whether it learns in a step, counted from 0."""
        return step >= self.since and (self.until is None or step < self.until)


class Parameters:
    """The buffer.

    Args:
        parts: What is in it; those that learn alike should stand together.
        device: Where it is.
        dtype: Of the tensors that a step computes with; the buffer is float32.

    Attributes:
        flat: [numbers], a leaf of autograd.
        groups: Stretches that learn alike.
        names: Of the parts, in order.
    """

    def __init__(self, parts: Sequence[Parameter], device: torch.device, dtype: torch.dtype) -> None:
        self.names = [part.name for part in parts]
        self._shapes = [tuple(part.initial.shape) for part in parts]
        self._sizes = [prod(shape) for shape in self._shapes]
        self._dtype = dtype
        self.groups = list(_grouped(parts, self._sizes))
        joined = torch.cat([part.initial.detach().reshape(-1).float().cpu() for part in parts])
        self.flat = joined.to(device).requires_grad_()
        self.flat.grad = torch.zeros_like(self.flat)

    @property
    def gradient(self) -> Tensor:
        """Of the whole buffer."""
        if self.flat.grad is None:
            raise RuntimeError("the gradient was taken away")
        return self.flat.grad

    def current(self, of: Tensor | None = None) -> dict[str, Tensor]:
        """The parts as a step computes with them, in its dtype; of another buffer of this kind, if one is given."""
        return self._parts((self.flat if of is None else of).to(self._dtype))

    def views(self, of: Tensor | None = None) -> dict[str, Tensor]:
        """The parts as views of the buffer, or of another one of its kind, without autograd."""
        return self._parts((self.flat if of is None else of).detach())

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = torch.split(flat, self._sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self._shapes, strict=True)}


def _grouped(parts: Sequence[Parameter], sizes: Sequence[int]) -> Iterator[Group]:
    start = 0
    pairs = zip(parts, sizes, strict=True)
    alike = groupby(pairs, key=lambda pair: (pair[0].lr, pair[0].weight_decay, pair[0].until, pair[0].since))
    for (lr, decay, until, since), members in alike:
        stop = start + sum(size for _, size in members)
        yield Group(start, stop, lr, decay, until, since)
        start = stop
