"""The work of converting an adapter to another family, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from sdops import adapters as shelf
from sdops.core.lowrank import Factors, decompose
from sdops.core.patch import Adapter, Patch
from sdops.core.ranks import Rule, energy, fixed, lowest
from sdops.verbs._adapter_base import Base
from sdops.verbs._adapter_changes import LOSSLESS, Change, change_of, norm_of, reduced
from sdops.verbs._adapter_output import Pieces, dtype_of
from sdops.verbs._adapters import patch_bytes

USUAL_RANK = 32  # of changes that are no product, where nobody asks for another


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a patch.

    Attributes:
        patch: What it was.
        rank: Of the LoRA; 0 where there is none.
        energy: ||delta||_F^2.
        lost: The same of what the new form leaves out.
        is_kept: It was what it should be, bit for bit.
    """

    patch: Patch
    rank: int
    energy: float = 0.0
    lost: float = 0.0
    is_kept: bool = False

    @property
    def captured(self) -> float:
        """Share of the energy that is kept."""
        return 1 - self.lost / self.energy if self.energy else 1.0


def converted(
    adapter: Adapter,
    family: str,
    wishes: Mapping[str, float],
    base: Base | None,
    dtype: str,
    pieces: Pieces,
    jobs: int,
    advance: Callable[[int], None],
) -> list[Layer]:
    """Convert all patches to LoRA, or to plain differences, and put them among the pieces.

    Args:
        adapter: Where they are.
        family: `lora` or `full`.
        wishes: `rank`, `energy` or none.
        base: The weights it was made for.
        dtype: Of what is computed; keep = as the patch.
        pieces: Grows.
        jobs: Threads.
        advance: Called with the bytes of each patch.
    """
    torch.set_num_threads(1)  # our own threads share the cores
    layers = []
    with ThreadPoolExecutor(jobs) as pool:
        make = partial(_as_lora if family == "lora" else _as_full, adapter, wishes, base)
        for layer, change in pool.map(make, adapter.patches):
            if change is None:
                pieces.keep(adapter, layer.patch)
            else:
                _put(pieces, change, dtype_of(adapter, layer.patch, dtype))
            layers.append(layer)
            advance(patch_bytes(adapter, layer.patch))
    return layers


def _put(pieces: Pieces, change: Change, dtype: str) -> None:
    if change.up is not None and change.down is not None and change.up.shape[1]:
        pieces.add_factors(change.target, change.shape, change.up, change.down, dtype)
    if change.dense is not None or change.bias is not None:
        pieces.add_full(change.target, dtype, dense=change.dense, bias=change.bias)


def _as_lora(
    adapter: Adapter, wishes: Mapping[str, float], base: Base | None, patch: Patch
) -> tuple[Layer, Change | None]:
    """A patch as LoRA; None as the change if it is kept."""
    is_plain = patch.family == "lora" and not {"mid", "dora_scale", "magnitude", "sparse_values"} & patch.parts.keys()
    own = _rank(adapter, patch)
    if is_plain:
        return Layer(patch, own or 0, is_kept=True), None
    most = int(wishes["rank"]) if "rank" in wishes else None
    change = change_of(adapter, patch, base, most)
    if len(change.shape) < 2 or (change.dense is None and change.up is None):
        return Layer(patch, 0, is_kept=True), None  # norms and biases
    if change.dense is None:
        found = reduced(change, _rule(wishes, LOSSLESS))
    else:
        matrix = change.matrix.double()
        usual = fixed(own or USUAL_RANK)
        found = decompose(matrix, _rule(wishes, lowest(usual, LOSSLESS)), engine="gram", name=str(patch.target))
    return _layer(patch, found), Change(
        change.target, change.shape, found.up, found.down, is_svd=True, bias=change.bias
    )


def _as_full(
    adapter: Adapter, _wishes: Mapping[str, float], base: Base | None, patch: Patch
) -> tuple[Layer, Change | None]:
    """A patch as plain differences; None as the change if it is kept."""
    if patch.family == "full" and not {"set", "set_b"} & patch.parts.keys():
        return Layer(patch, 0, is_kept=True), None
    change = change_of(adapter, patch, base)
    dense = None if change.up is None and change.dense is None else change.matrix.reshape(change.shape)
    return Layer(patch, 0, norm_of(change) ** 2), Change(change.target, change.shape, dense=dense, bias=change.bias)


def _rule(wishes: Mapping[str, float], usual: Rule) -> Rule:
    if "rank" in wishes:
        return lowest(fixed(int(wishes["rank"])), LOSSLESS)
    return energy(wishes["energy"]) if "energy" in wishes else usual


def _layer(patch: Patch, found: Factors) -> Layer:
    whole = found.spectrum.energy
    lost = max(whole - float(found.spectrum.values[: found.rank].square().sum()), 0.0)
    return Layer(patch, found.rank, whole, lost)


def _rank(adapter: Adapter, patch: Patch) -> int | None:
    facts = shelf.family(patch.family).check(adapter.shapes(patch), None)
    limits = [size for size in (facts.rows, facts.columns) if size is not None]
    return None if facts.rank is None else min(facts.rank, *limits, prod(limits))
