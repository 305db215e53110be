"""What every tensor of a model gains by some adapters: decided from names and shapes, computed when it is read.

Plain LoRA factors are read and multiplied in numpy; every other family is torch's, through the adapters shelf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from sdops.adapters import Facts, Settings, Shape, family
from sdops.adapters._parts import scale_of
from sdops.adapters._parts import unfit as unfit_part
from sdops.core.applied import Change, Dense, Factors, LowRank, Weights
from sdops.core.patch import Patch
from sdops.core.precision import Singles
from sdops.core.spec import Spec
from sdops.errors import MismatchError
from sdops.layouts.tables import Part
from sdops.verbs._adapter_source import singles_of, values_of
from sdops.verbs._adapters import check_fits, read_parts, unfit
from sdops.verbs._apply_loras import Lora
from sdops.verbs._apply_places import Piece, Place, Places
from sdops.verbs._inputs import FIRST_LAYERS, Opened

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN_PARTS = {"up", "down", "lora_alpha", "up_bias"}
_PLAIN_SETTINGS = {"lora_alpha", "use_rslora"}
_DORA = ("dora_scale", "magnitude")


@dataclass(slots=True)
class Matched:
    """What became of one LoRA's patches.

    Attributes:
        modules: Component -> number of layers that it changes.
        families: Family -> number of layers.
        ranks: Rank -> number of layers.
        keys: The tensors that it changes.
        unmatched: Layers that the model does not have.
        silent: Layers whose strength is 0.
        grown: Tensors that are filled up with zeros first -> their new shape.
    """

    modules: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    unmatched: list[str] = field(default_factory=list)
    silent: int = 0
    grown: dict[str, Shape] = field(default_factory=dict)


class Changes:
    """All changes of a model by some LoRAs.

    Args:
        model: The model.
        loras: What is applied, in order.
        peft_dora: Scale what DoRA adds before its norm, as PEFT does, instead of the result.

    Attributes:
        terms: Tensor -> what is added to it.
        shapes: Tensor -> its shape, of those that grow.
        matched: What became of each LoRA.

    Raises:
        MismatchError: a patch does not fit the shape of its layer, which is named.
    """

    def __init__(self, model: Opened, loras: Sequence[Lora], *, peft_dora: bool) -> None:
        self.model = model
        self.terms: dict[str, list[LowRank | Dense]] = {}
        self.shapes: dict[str, Shape] = {}
        self.matched = [Matched() for _ in loras]
        self._places = Places(model)
        self._peft_dora = peft_dora
        self._fitting: dict[str, set[Shape]] = {}  # tensor -> shapes that the patches were made for
        for lora, matched in zip(loras, self.matched, strict=True):
            for patch in lora.adapter.patches:
                self._add(lora, patch, matched)
        self._check_growth()
        del self._places  # all names of the model, for nobody else

    def changes(self, specs: dict[str, Spec], scales: dict[str, str]) -> dict[str, Change]:
        """For core.applied.

        Args:
            specs: The changed tensors as they shall be written, before any of them grows.
            scales: fp8 tensor -> the tensor that holds its scale.
        """
        return {
            key: Change(
                Spec(specs[key].dtype, self.shapes.get(key, specs[key].shape)), tuple(terms), scales.get(key, "")
            )
            for key, terms in self.terms.items()
        }

    def _add(self, lora: Lora, patch: Patch, matched: Matched) -> None:
        facts = family(patch.family).check(lora.adapter.shapes(patch), None)
        found = False
        with_bias = facts.bias or (facts.bias_if_any and self._places.find(patch.target, "bias") is not None)
        for parameter, changes in (("weight", facts.weight), ("bias", with_bias)):
            if changes:
                found |= self._add_parameter(lora, patch, facts, parameter, matched)
        if found:
            matched.modules[patch.target.component] += 1
            matched.families[_family_name(patch)] += 1
            if facts.rank is not None:
                matched.ranks[facts.rank] += 1

    def _add_parameter(self, lora: Lora, patch: Patch, facts: Facts, parameter: str, matched: Matched) -> bool:
        """Terms for the tensors that hold the weight or the bias of a layer; whether there are any."""
        place = self._places.find(patch.target, parameter)
        if place is None:
            if lora.strength.is_zero_for(patch.target.component) and not self._has(patch.target.component):
                matched.silent += 1
            else:
                matched.unmatched.append(f"{patch.target}{'' if parameter == 'weight' else '.bias'}")
            return False
        shape = place.shape_of(patch.target)
        if parameter == "weight":
            shape = self._grown(lora, patch, facts, place, shape, matched)
            check_fits(lora.adapter, patch, shape)
        elif facts.rows is not None and (facts.rows,) != shape:
            raise unfit(lora.adapter, patch, unfit_part("up", (facts.rows,), shape))
        strengths = {piece.key: lora.strength.of(self.model, piece.key) for piece in place.pieces(patch.target)}
        if not any(strengths.values()):
            matched.silent += 1
            return False
        for key, terms in self._terms(lora, patch, parameter, place, shape, strengths):
            self.terms.setdefault(key, []).extend(terms)
            matched.keys.add(key)
        return True

    def _terms(
        self, lora: Lora, patch: Patch, parameter: str, place: Place, shape: Shape, strengths: dict[str, float]
    ) -> Iterator[tuple[str, list[LowRank | Dense]]]:
        """Tensor -> what is added to it."""
        pieces: dict[str, list[Piece]] = {}
        for piece in place.pieces(patch.target):
            if strengths[piece.key]:
                pieces.setdefault(piece.key, []).append(piece)
        plain = parameter == "weight" and _is_plain(patch)
        for key, own in pieces.items():
            if plain:
                rows = self.model.source.specs[key].shape[0]
                yield (
                    key,
                    [
                        LowRank(
                            piece.start,
                            rows if piece.turned else piece.rows,
                            _Plain(lora, patch, piece, strengths[key]),
                        )
                        for piece in own
                    ],
                )
            else:
                size = self.shapes.get(key, self.model.source.specs[key].shape)
                inside = self._peft_dora and any(part in patch.parts for part in _DORA)
                change = _Torch(lora, patch, parameter, place, tuple(own), shape, size, strengths[key], inside)
                yield key, [Dense(change)]

    def _grown(self, lora: Lora, patch: Patch, facts: Facts, place: Place, shape: Shape, matched: Matched) -> Shape:
        """The shape that a weight is filled up to before the patch is added: `reshape`, or more input channels."""
        if "reshape" in patch.parts:
            wanted = tuple(int(size) for size in values_of(lora.adapter.source, patch.parts["reshape"]).reshape(-1))
        elif patch.family == "lora" and len(shape) == 2 and f"{patch.target.module}.weight" in FIRST_LAYERS:
            wanted = (shape[0], max(facts.columns or 0, shape[1]))  # Black Forest Labs' control LoRAs
        else:
            wanted = shape
        key = place.parts[0].key
        if place.is_whole and patch.target.share is None:
            self._fitting.setdefault(key, set()).add(wanted)
        if wanted == shape:
            return shape
        if not place.is_whole or patch.target.share is not None or len(wanted) != len(shape) or min(wanted) < 1:
            raise unfit(lora.adapter, patch, unfit_part("reshape", wanted, shape))
        if any(new < old for new, old in zip(wanted, shape, strict=True)):
            raise unfit(lora.adapter, patch, unfit_part("reshape", wanted, shape))
        self.shapes[key] = matched.grown[key] = wanted
        return wanted

    def _check_growth(self) -> None:
        """Raises MismatchError if one LoRA makes a tensor larger and another was made for its old shape."""
        for key, shape in self.shapes.items():
            if len(self._fitting[key]) > 1:
                others = sorted(self._fitting[key] - {shape})
                raise MismatchError(
                    f"one of the LoRAs makes `{key}` {list(shape)}, another was made for {list(others[0])}",
                    hint="apply one of them, or write the result of the first and apply the other to it",
                    key=key,
                )

    def _has(self, component: str) -> bool:
        return self.model.detection.component(component) is not None


def _family_name(patch: Patch) -> str:
    """The family, and whether DoRA is on top."""
    return f"{patch.family} with DoRA" if any(part in patch.parts for part in _DORA) else patch.family


def _is_plain(patch: Patch) -> bool:
    """Whether it is up @ down and nothing else."""
    return patch.family == "lora" and patch.parts.keys() <= _PLAIN_PARTS and patch.settings.keys() <= _PLAIN_SETTINGS


@dataclass(frozen=True, slots=True)
class _Plain:
    """The factors of a plain LoRA for some rows, without torch; strength and alpha / r are in up."""

    lora: Lora
    patch: Patch
    piece: Piece
    strength: float

    def __call__(self) -> Factors:
        source, key = self.lora.adapter.source, self.patch.parts["down"]
        down = singles_of(source, key).reshape(source.specs[key].shape[0], -1)  # [r, i kh kw]
        scale = np.float32(self.strength * self._scale(len(down)))
        if not self.piece.turned:
            return partial(self._rows, scale), down
        turned = np.ascontiguousarray(down.T)
        return (lambda first, last: turned[first:last]), np.ascontiguousarray(self._rows(scale, 0, self.piece.rows).T)

    def _rows(self, scale: np.float32, first: int, last: int) -> Singles:
        """Rows of up [o, r], read when a product needs them: all would be more than what else is held of a tensor."""
        begin = self.piece.begin
        up = singles_of(self.lora.adapter.source, self.patch.parts["up"], (begin + first, begin + last))
        up *= scale
        return up.reshape(last - first, -1)

    def _scale(self, rank: int) -> float:
        settings, parts = self.patch.settings, self.patch.parts
        alpha = settings.get("lora_alpha")
        if alpha is None and "lora_alpha" in parts:
            alpha = values_of(self.lora.adapter.source, parts["lora_alpha"])[0, 0]
        wanted = Settings(None if alpha is None else float(alpha), use_rslora=bool(settings.get("use_rslora")))
        return scale_of({}, rank, wanted)


@dataclass(frozen=True, slots=True)
class _Torch:
    """The change that any family makes to one of the model's tensors, by the adapters shelf.

    Attributes:
        parameter: `weight` or `bias`.
        place: Where the layer's parameter is.
        pieces: The rows of this tensor.
        shape: Of the rows that the patch is for.
        size: Of the tensor.
        strength: How strong.
        inside: The strength acts before DoRA's norm.
    """

    lora: Lora
    patch: Patch
    parameter: str
    place: Place
    pieces: tuple[Piece, ...]
    shape: Shape
    size: Shape
    strength: float
    inside: bool

    def __call__(self, weights: Weights) -> Singles:
        import torch

        how = family(self.patch.family)
        weight = torch.from_numpy(self._weight(weights)) if how.needs_weight(self.patch.parts) else None
        settings = dict(self.patch.settings) | ({"strength": self.strength} if self.inside else {})
        parts = read_parts(self.lora.adapter, self.patch)
        make = how.delta if self.parameter == "weight" else how.bias_delta
        with torch.no_grad():
            delta: Tensor | None = make(parts, self.shape, weight, **settings)
        total = np.zeros((self.size[0] if self.size else 1, prod(self.size[1:])), np.float32)
        if delta is None:
            return total
        rows = delta.float().numpy().reshape(self.shape[0] if self.shape else 1, -1)
        rows = rows * np.float32(1.0 if self.inside else self.strength)
        for piece in self.pieces:
            if piece.turned:
                return np.ascontiguousarray(rows.T)
            total[piece.start : piece.start + piece.rows] = rows[piece.begin : piece.begin + piece.rows]
        return total

    def _weight(self, weights: Weights) -> Singles:
        """The rows of the layer's parameter that the patch is for, as it stores them."""
        whole = np.concatenate([_part(weights(part.key), part) for part in self.place.parts])
        start, _, total = self.patch.target.share or (0, 1, 1)
        first = len(whole) * start // total
        rows = whole[first : first + self.shape[0]]
        return np.ascontiguousarray(np.roll(rows, len(rows) // 2, axis=0) if self.patch.target.swapped else rows)


def _part(values: Singles, part: Part) -> Singles:
    """What a part of a layer's parameter is in the canonical layout."""
    if part.share is not None:
        start, stop, total = part.share
        values = values[len(values) * start // total : len(values) * stop // total]
    if part.operation == "swap":
        return np.roll(values, len(values) // 2, axis=0)
    if part.operation == "transpose":
        return values.T
    if part.operation == "linear":
        return values.reshape(values.shape[:2])
    return values[..., None, None] if part.operation == "conv" else values
