"""The work of merging LoRAs: which patches meet in a layer, and what becomes of them, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from sdops import adapters as shelf
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.ranks import fixed, lowest
from sdops.dialects import dialect
from sdops.errors import MismatchError
from sdops.verbs._adapter_base import Base
from sdops.verbs._adapter_blocks import Blocks
from sdops.verbs._adapter_changes import LOSSLESS, Change, change_of, joined, norm_of, reduced
from sdops.verbs._adapter_methods import Knobs, merged
from sdops.verbs._adapter_output import Pieces, dtype_of
from sdops.verbs._merge_adapters_wish import Wish


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a layer.

    Attributes:
        target: The layer.
        sources: Indices of the LoRAs that change it.
        rank: Of the result; None if it is no product.
        energy: ||merged change||_F^2.
        lost: The same of what the rank leaves out.
    """

    target: Target
    sources: tuple[int, ...]
    rank: int | None
    energy: float
    lost: float


class Group(NamedTuple):
    """What all adapters do to one layer, or to the same rows of it: index of the adapter -> its patches."""

    target: Target
    patches: Mapping[int, tuple[Patch, ...]]


def groups(adapters: Sequence[Adapter]) -> list[Group]:
    """All layers in the order in which the adapters name them.

    Where the adapters divide a layer's rows in the same way (or each speaks of rows of its own) the rows stay apart;
    otherwise the layer is taken as a whole.
    """
    modules: dict[tuple[str, str], list[tuple[int, Patch]]] = {}
    for index, adapter in enumerate(adapters):
        for patch in adapter.patches:
            modules.setdefault((patch.target.component, patch.target.module), []).append((index, patch))
    return [group for (component, module), found in modules.items() for group in _divided(component, module, found)]


def _divided(component: str, module: str, found: Sequence[tuple[int, Patch]]) -> Iterator[Group]:
    shares = dict.fromkeys(patch.target.share for _, patch in found)
    whole = any(_overlap(one, other) for one in shares for other in shares if one != other)
    for share in (None,) if whole else shares:
        patches: dict[int, tuple[Patch, ...]] = {}
        for index, patch in found:
            if whole or patch.target.share == share:
                patches[index] = (*patches.get(index, ()), patch)
        yield Group(Target(component, module, share), patches)


def _overlap(one: tuple[int, int, int] | None, other: tuple[int, int, int] | None) -> bool:
    first, second = one or (0, 1, 1), other or (0, 1, 1)
    return first[0] * second[2] < second[1] * first[2] and second[0] * first[2] < first[1] * second[2]


class Work:
    """Merges layer by layer.

    Args:
        adapters: The inputs.
        wish: What to do.
        to: The dialect of the result, which decides whether differences may be dense.
        base: The weights they are for, if there are any.
        device: Where the algebra is done; changes are read and written by the CPU.
    """

    def __init__(
        self, adapters: Sequence[Adapter], wish: Wish, to: str, base: Base | None, device: str = "cpu"
    ) -> None:
        self.adapters, self.wish, self.base, self.device = adapters, wish, base, device
        self.groups = groups(adapters)
        self._blocks = Blocks(adapters[0])
        self._blocks.components = list(dict.fromkeys(group.target.component for group in self.groups))
        self._dials = [self._blocks.dial(text or 1.0, "blocks") for text in wish.blocks]
        self._dense = ("full", "diff") in vars(dialect(to))["SPELLING"].suffixes
        self._convolutions: set[Target] = set()

    def is_convolution(self, target: Target) -> bool:
        """Whether a layer's kernel turned out to be larger than 1x1."""
        return target in self._convolutions

    def run(self, pieces: Pieces, jobs: int) -> Iterator[Layer]:
        """Merge all layers and put them among the pieces, in order."""
        torch.set_num_threads(1)  # our own threads share the cores
        with ThreadPoolExecutor(jobs) as pool:
            for group, change in zip(self.groups, pool.map(self._merged, self.groups), strict=True):
                yield from self._placed(group, change, pieces)

    def weight(self, index: int, target: Target) -> float:
        """Of one adapter's change of a layer."""
        return self.wish.weights[index] * self._blocks.weight(self._dials[index], target)

    def _merged(self, group: Group) -> tuple[Change, float, float] | None:
        """The change, its energy, and what its rank loses; None if the only patch of the layer stays as it is."""
        if self._stays(group):
            return None
        read: list[tuple[Adapter, Change]] = []
        for index, patches in group.patches.items():
            weight, adapter = self.weight(index, group.target), self.adapters[index]
            if weight:
                own = joined(group.target, [change_of(adapter, patch, self.base) for patch in patches])
                read.append((adapter, own.scaled(weight).to(self.device)))
        if not read:
            return Change(group.target, (0,)), 0.0, 0.0
        check_shapes(group.target, read)
        changes = [change for _, change in read]
        knobs: Knobs = Knobs(self.wish.density, self.wish.seed)
        change, energy, lost = self._cut(merged(self.wish.method, group.target, changes, knobs), group)
        return change.to("cpu"), energy, lost

    def _stays(self, group: Group) -> bool:
        """Whether nothing is done to a layer: one patch alone, at its own strength, in its own dtype."""
        patches = [(index, patch) for index, found in group.patches.items() for patch in found]
        if len(patches) > 1 or self.wish.method not in ("concat", "orthogonal"):
            return False
        index, _ = patches[0]
        return self.weight(index, group.target) == 1 and self.wish.dtype == "keep" and self.wish.rank is None

    def _cut(self, change: Change, group: Group) -> tuple[Change, float, float]:
        """Without what is zero, and of the rank that was asked for; dense where factors would be larger."""
        if change.up is None:
            return change, norm_of(change) ** 2, 0.0
        rows, columns = change.shape[0], prod(change.shape[1:])
        rank = self._rank(group)
        if rank is None and self._dense and change.up.shape[1] >= min(rows, columns):
            dense = change.matrix.reshape(change.shape)
            return replace(change, up=None, down=None, dense=dense), norm_of(change) ** 2, 0.0
        found = reduced(change, LOSSLESS if rank is None else lowest(fixed(rank), LOSSLESS))
        energy = found.spectrum.energy
        lost = max(energy - float(found.spectrum.values[: found.rank].square().sum()), 0.0)
        return replace(change, up=found.up, down=found.down, is_svd=True), energy, lost

    def _rank(self, group: Group) -> int | None:
        """The highest rank of the result; `svd` keeps that of the LoRAs if none is asked for."""
        if self.wish.rank is not None or self.wish.method != "svd":
            return self.wish.rank
        found = [
            shelf.family(patch.family).check(self.adapters[index].shapes(patch), None).rank
            for index, patches in group.patches.items()
            for patch in patches
        ]
        return max((rank for rank in found if rank), default=None)

    def _placed(self, group: Group, made: tuple[Change, float, float] | None, pieces: Pieces) -> Iterator[Layer]:
        sources = tuple(group.patches)
        first = group.patches[sources[0]][0]
        if made is None:
            pieces.keep(self.adapters[sources[0]], first)
            shapes = self.adapters[sources[0]].shapes(first)
            yield Layer(group.target, sources, shapes["down"][0] if "down" in shapes else None, 0.0, 0.0)
            return
        change, energy, lost = made
        dtype = dtype_of(self.adapters[sources[0]], first, self.wish.dtype)
        if prod(change.shape[2:]) > 1:
            self._convolutions.add(group.target)
        rank: int | None = None
        if change.up is not None and change.down is not None:
            rank = change.up.shape[1]
            if rank:
                pieces.add_factors(change.target, change.shape, change.up, change.down, dtype)
        if change.dense is not None or change.bias is not None:
            pieces.add_full(change.target, dtype, dense=change.dense, bias=change.bias)
        yield Layer(group.target, sources, rank, energy, lost)


def check_shapes(target: Target, changes: Sequence[tuple[Adapter, Change]]) -> None:
    """Refuse layers whose sizes differ.

    Raises:
        MismatchError: names the layer, and two of the files.
    """
    sizes: dict[tuple[int, int], str] = {}  # -> the first file that has it
    for adapter, change in changes:
        if change.up is not None or change.dense is not None:
            sizes.setdefault((change.shape[0], prod(change.shape[1:])), adapter.source.name)
    if len(sizes) > 1:
        shown = " and ".join(f"{rows}x{columns} in `{name}`" for (rows, columns), name in list(sizes.items())[:2])
        raise MismatchError(
            f"`{target}` is {shown}: they are for different models, or one of them is damaged",
            hint=f"`sdops inspect {' '.join(list(sizes.values())[:2])}` shows what each is for",
            target=target,
        )
