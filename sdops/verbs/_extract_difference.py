"""Read the difference of a layer in two models, piece by piece, and what its values tell of rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from sdops.core.inputs import nonfinite
from sdops.core.lowrank import squared_norm
from sdops.core.ranks import rounding_variance, squared_ulps
from sdops.core.source import aligned
from sdops.core.stream import TORCH_DTYPES
from sdops.layouts.tables import Part
from sdops.verbs._extract_pairs import Pair, Side

PIECE = 1 << 18  # elements read at once; what is made of them stays in the cache

_FP8_EPS = {"F8_E4M3": 2.0**-3, "F8_E5M2": 2.0**-2, "F8_E4M3FNUZ": 2.0**-3, "F8_E5M2FNUZ": 2.0**-2}


@dataclass(frozen=True, slots=True)
class Difference:
    """A layer's change.

    Attributes:
        values: Tuned - base, float32, as a matrix [o, i] or a vector [o].
        weight: Squared Frobenius norm of the base's tensor.
        tuned_noise, base_noise: Variance of the error that either's rounding makes.
    """

    values: Tensor
    weight: float
    tuned_noise: float
    base_noise: float


def difference(pair: Pair, *, noise: bool = True) -> Difference:
    """Tuned - base. The difference of neighbouring half-precision numbers is exact in float32 (Sterbenz).

    Args:
        pair: A layer in both models.
        noise: Whether to measure rounding; it is 0 otherwise.

    Raises:
        FormatError: a value is NaN or infinite; the error names the tensor.
    """
    values = torch.empty(pair.matrix if len(pair.shape) > 1 else pair.shape)
    flat, position, tuned_ulps, base_ulps, weight = values.view(-1), 0, 0.0, 0.0, 0.0
    for part, piece in _pieces(pair.tuned):
        place = flat[position : position + len(piece)].copy_(piece)
        position += len(piece)
        _finite(pair.tuned, part, place)
        tuned_ulps += _squared_ulps(piece, pair.tuned.stored_dtype) if noise else 0.0
    position = 0
    for part, piece in _pieces(pair.base):
        known = piece.float()
        weight += _finite(pair.base, part, known)
        flat[position : position + len(piece)].sub_(known)
        position += len(piece)
        base_ulps += _squared_ulps(piece, pair.base.stored_dtype) if noise else 0.0
    return Difference(values, weight, rounding_variance(tuned_ulps, len(flat)), rounding_variance(base_ulps, len(flat)))


def _finite(side: Side, part: Part, values: Tensor) -> float:
    """The squared norm of values that are numbers all.

    Raises:
        FormatError: one is not.
    """
    found = squared_norm(values)
    nan, infinite = (0, 0) if isfinite(found) else (int(values.isnan().sum()), int(values.isinf().sum()))
    if nan + infinite:
        raise nonfinite(side.input(part), nan, infinite)
    return found


def _squared_ulps(piece: Tensor, stored: str) -> float:
    if piece.dtype == torch.float64:
        return 0.0
    if stored not in _FP8_EPS:
        return squared_ulps(piece)
    return squared_ulps(piece) * (_FP8_EPS[stored] / torch.finfo(piece.dtype).eps) ** 2  # seen through its scale


def _pieces(side: Side) -> Iterator[tuple[Part, Tensor]]:
    """The elements of a tensor in their order, a piece at a time, each with the part that it is of."""
    for part in side.parts:
        for piece in _pieces_of(side, part):
            yield part, piece


def _pieces_of(side: Side, part: Part) -> Iterator[Tensor]:
    """The elements of a part in their order, a piece at a time."""
    spec = side.model.source.specs[part.key]
    start, stop, total = part.share or (0, 1, 1)
    row = spec.numel // spec.shape[0]
    first, last = (spec.shape[0] * row * edge // total for edge in (start, stop))
    if part.operation == "transpose":
        whole = torch.cat(list(_read(side, part, first, last)))
        yield whole.view(-1, row).T.reshape(-1)
    elif part.operation == "swap":
        middle = (first + last) // 2
        yield from _read(side, part, middle, last)
        yield from _read(side, part, first, middle)
    else:
        yield from _read(side, part, first, last)


def _read(side: Side, part: Part, first: int, last: int) -> Iterator[Tensor]:
    """Elements `[first, last)` of a tensor as it is stored, in one buffer that is used again and again."""
    dtype = TORCH_DTYPES[side.model.source.specs[part.key].dtype]
    size = dtype.itemsize
    buffer = aligned(min(PIECE, last - first) * size) if part.operation != "transpose" else None
    for begin in range(first, last, PIECE):
        count = min(PIECE, last - begin)
        view = aligned(count * size) if buffer is None else buffer[: count * size]
        side.model.source.read_into(part.key, begin * size, view)
        yield torch.frombuffer(view, dtype=dtype)
