"""Changes of weights in few numbers, as `bake` takes them: LoRA, LoHa, LoKr, dense ones, with DoRA on top of any.

Weights are matrices [rows, columns]; a kernel [o, i, kh, kw] is one of o rows. A change may be for some of the rows.
The strength t is the caller's: W + t change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["Change", "Dense", "LoHa", "LoKr", "LoRA", "gain_of", "matrices"]

NO_GAIN = 2  # in place of an axis
EPSILON = torch.finfo(torch.float32).eps  # beside norms

Own = TypeVar("Own", bound="Change")


@dataclass(frozen=True, kw_only=True)
class Change(ABC):
    """What all kinds have, beside their parts and a `scale`: alpha / rank.

    Attributes:
        first: The first row that changes.
        slot: Which of the strengths it has.
        strength: Set when it runs.
        gain: DoRA, float32: magnitude / norm, per row of the change or per column: the change is (W + change) gain - W.
        gain_axis: 0 = per row, 1 = per column.
    """

    first: int = 0
    slot: int = 0
    strength: float = 1.0
    gain: Tensor | None = None
    gain_axis: int = 0

    kind: ClassVar[int]

    def _flatten(self, *names: str) -> None:
        """Make matrices of parts; kernels of convolutions have many columns, vectors are one row."""
        for name in names:
            part = getattr(self, name)
            object.__setattr__(self, name, part.flatten(1) if part.ndim > 1 else part[None])

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def rank(self) -> int:
        """Of the factors; 0 where there are none."""
        return 0

    def tensors(self) -> list[Tensor]:
        """The numbers it is made of."""
        return [
            own for each in fields(self) if each.name != "gain" and isinstance(own := getattr(self, each.name), Tensor)
        ]

    def rows(self) -> list[Tensor]:
        """Those whose rows lie along the weight's."""
        return []

    @abstractmethod
    def delta(self) -> Tensor:
        """The change without gain at strength 1, float32 [rows, columns]: the reference."""

    def rows_of_delta(self) -> Callable[[slice], Tensor]:
        """What gives some rows of `delta`."""
        return self.delta().__getitem__

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError if the change does not fit a weight's shape."""
        rows, columns = shape[0], prod(shape[1:])
        if len(shape) == 1:
            rows, columns = 1, shape[0]
        if self.shape[1] != columns or self.first < 0 or self.first + self.shape[0] > rows:
            raise ValueError(f"a change of rows {self.first} + {list(self.shape)} of a weight of shape {list(shape)}")

    def entry(self, factor: torch.dtype) -> tuple[list[int], list[Tensor | None]]:
        """Its row of the kernel's table, and the tensors whose addresses are in it."""
        used = [_plain(tensor, factor) for tensor in self.tensors()]
        pointers = [tensor.data_ptr() for tensor in used] + [0] * (4 - len(used))
        strides = [used[0].stride(0), used[1].stride(0) if len(used) > 1 else 0]
        gain = None if self.gain is None else self.gain.float().contiguous()
        inner = list(used[1].shape) if isinstance(self, LoKr) else [0, 0]
        row = [self.kind, *pointers, self.rank, *strides, self.first, self.shape[0]]
        axis = NO_GAIN if gain is None else self.gain_axis
        return [*row, gain.data_ptr() if gain is not None else 0, axis, *inner], [*used, gain]

    @abstractmethod
    def turned(self, rows: int) -> Change:
        """The same change of the transposed weight, of which all `rows` columns change."""

    @abstractmethod
    def reordered(self, order: Callable[[Tensor], Tensor]) -> Change:
        """The same change of a weight whose columns are in another order."""


@dataclass(frozen=True)
class LoRA(Change):
    """up [rows, rank] @ down [rank, columns]."""

    up: Tensor
    down: Tensor
    scale: float = 1.0
    kind: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._flatten("up", "down")
        if self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"up {list(self.up.shape)} and down {list(self.down.shape)} have different ranks")

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """See `Change`."""
        return self.up.shape[1]

    def rows(self) -> list[Tensor]:
        """See `Change`."""
        return [self.down]

    def delta(self) -> Tensor:
        """See `Change`."""
        return self.up.float() @ self.down.float() * self.scale

    def rows_of_delta(self) -> Callable[[slice], Tensor]:
        """See `Change`; the product is made for those rows alone."""
        up, down = self.up.float() * self.scale, self.down.float()
        return lambda rows: up[rows] @ down

    def turned(self, rows: int) -> Change:
        """See `Change`."""
        up = _padded(self.up, self.first, rows)
        return replace_factors(self, {"up": self.down.T.contiguous(), "down": up.T.contiguous()}, rows)

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Change:
        """See `Change`."""
        return replace_factors(self, {"up": self.up, "down": order(self.down)})


@dataclass(frozen=True)
class LoHa(Change):
    """(w1_a @ w1_b) * (w2_a @ w2_b), elementwise: [rows, rank] @ [rank, columns] each."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    kind: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._flatten("w1_a", "w1_b", "w2_a", "w2_b")
        if not self.w1_a.shape[1] == self.w1_b.shape[0] == self.w2_a.shape[1] == self.w2_b.shape[0]:
            raise ValueError("the factors of a LoHa have different ranks")

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        """See `Change`."""
        return self.w1_a.shape[1]

    def rows(self) -> list[Tensor]:
        """See `Change`."""
        return [self.w1_b, self.w2_b]

    def delta(self) -> Tensor:
        """See `Change`."""
        one, two = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return one * two * self.scale

    def turned(self, rows: int) -> Change:
        """See `Change`."""
        parts = {
            "w1_a": self.w1_b.T.contiguous(),
            "w1_b": _padded(self.w1_a, self.first, rows).T.contiguous(),
            "w2_a": self.w2_b.T.contiguous(),
            "w2_b": _padded(self.w2_a, self.first, rows).T.contiguous(),
        }
        return replace_factors(self, parts, rows)

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Change:
        """See `Change`."""
        parts = {"w1_a": self.w1_a, "w1_b": order(self.w1_b), "w2_a": self.w2_a, "w2_b": order(self.w2_b)}
        return replace_factors(self, parts)


@dataclass(frozen=True)
class LoKr(Change):
    """w1 [a, b] (x) w2 [c, d]: element (i c + u, j d + v) is w1[i, j] w2[u, v]."""

    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    kind: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._flatten("w1", "w2")

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def delta(self) -> Tensor:
        """See `Change`."""
        product = self.w1.float()[:, None, :, None] * self.w2.float()[None, :, None, :]
        return product.reshape(self.shape) * self.scale

    def turned(self, rows: int) -> Change:
        """See `Change`."""
        if (self.first, self.shape[0]) != (0, rows):
            return as_dense(self).turned(rows)
        return replace_factors(self, {"w1": self.w1.T.contiguous(), "w2": self.w2.T.contiguous()}, rows)

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Change:
        """See `Change`."""
        return as_dense(self).reordered(order)


@dataclass(frozen=True)
class Dense(Change):
    """Any change, as it is: [rows, columns]."""

    change: Tensor
    scale: float = 1.0
    kind: ClassVar[int] = 3

    def __post_init__(self) -> None:
        self._flatten("change")

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change`."""
        return self.change.shape[0], self.change.shape[1]

    def rows(self) -> list[Tensor]:
        """See `Change`."""
        return [self.change]

    def delta(self) -> Tensor:
        """See `Change`."""
        return self.change.float() * self.scale

    def turned(self, rows: int) -> Change:
        """See `Change`."""
        return replace_factors(self, {"change": _padded(self.change, self.first, rows).T.contiguous()}, rows)

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Change:
        """See `Change`."""
        return replace_factors(self, {"change": order(self.change)})


def as_dense(change: Change) -> Dense:
    """Any change as a dense one."""
    common = {each.name: getattr(change, each.name) for each in fields(Change)}
    return Dense(change.delta(), **common)


def replace_factors(change: Own, parts: dict[str, Tensor], rows: int | None = None) -> Own:
    """The change with other factors; with `rows`, of the transposed weight."""
    if rows is None:
        return replace(change, **parts)
    gain = change.gain
    if gain is not None and change.gain_axis == 0:
        padded = torch.ones(rows, device=gain.device)
        padded[change.first : change.first + len(gain)] = gain
        gain = padded
    return replace(change, **parts, first=0, gain=gain, gain_axis=1 - change.gain_axis)


def matrices(weight: Tensor, out: Tensor, changes: Sequence[Change]) -> tuple[Tensor, Tensor, list[Change]] | None:
    """Weight and result as matrices whose rows are contiguous, without a copy, and the changes of those.

    A matrix that is stored by columns is turned, with its changes; channels_last kernels have their columns in another
    order. None if the strides of the two are neither.
    """
    if weight.ndim == 1:
        return (weight[None], out[None], list(changes)) if weight.is_contiguous() and out.is_contiguous() else None
    if weight.ndim == 2 and weight.stride(1) == 1 == out.stride(1):
        return weight, out, list(changes)
    if weight.is_contiguous() and out.is_contiguous():
        return weight.flatten(1), out.flatten(1), list(changes)
    if weight.ndim == 2 and weight.stride(0) == 1 == out.stride(0):
        sliced = any(change.gain is not None and change.shape[0] != len(weight) for change in changes)
        return None if sliced else (weight.T, out.T, [change.turned(len(weight)) for change in changes])
    last = torch.channels_last
    if weight.ndim == 4 and all(x.is_contiguous(memory_format=last) for x in (weight, out)):
        inner = weight.shape[1]

        def order(columns: Tensor) -> Tensor:
            return columns.reshape(len(columns), inner, -1).transpose(1, 2).reshape(len(columns), -1)

        if any(change.gain is not None and change.gain_axis for change in changes):
            return None
        flat = [x.permute(0, 2, 3, 1).flatten(1) for x in (weight, out)]
        return flat[0], flat[1], [change.reordered(order) for change in changes]
    return None


def gain_of(weight: Tensor, change: Change, magnitude: Tensor, axis: int = 0) -> Tensor:
    """DoRA's gain: magnitude / (||W + change|| + eps), per output (axis 0) or per input channel (axis 1).

    Args:
        weight: The rows that the change is for, [rows, ...].
        change: Without gain, at strength 1.
        magnitude: One number per output or input channel.
        axis: Which.

    Returns:
        float32: one per row, or one per column of the weight as a matrix.
    """
    directed = weight.float() + change.delta().reshape(weight.shape)
    kernel = prod(weight.shape[2:])
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm: Tensor = torch.linalg.vector_norm(directed, dim=others) + EPSILON
    gain = magnitude.reshape(-1).float() / norm
    return gain if axis == 0 else gain.repeat_interleave(kernel)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype, with contiguous rows."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def _padded(part: Tensor, first: int, rows: int) -> Tensor:
    """The rows of a factor among zeros."""
    if len(part) == rows:
        return part
    whole = part.new_zeros(rows, part.shape[1])
    whole[first : first + len(part)] = part
    return whole
