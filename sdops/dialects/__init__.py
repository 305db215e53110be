"""SHELF: spellings of adapter files (LoRA and its relatives). One file is one dialect.

Each module offers

    score(keys: Collection[str]) -> float       which share of a file's names is spelled this way, 0 to 1
    stems(names: Names) -> Mapping[str, Target] every name of a layer in this dialect -> the layer
    read(file: Contents, names: Names) -> Reading
        The file's patches, extras and unknown names; half pairs and layers that come twice are its `problem`. Raises
        FormatError for adapters that are only valid on a base that is not there, and several in one file.
    write(adapter: Adapter, names: Names, values: Values) -> Written
        What the tensors of a file in this dialect are made of. Raises MismatchError for what it cannot hold.

A dialect knows how things are called, not what they are: `Names` (the layers of one architecture in all layouts) is
made by the caller, the meaning of parts is the adapters shelf's. Nothing here reads a value but through `Values`, and
nothing computes: what is written are the file's own tensors, moved, and scaled only where a dialect has no place for an
alpha.

Parts of the shelf: `_suffixes` (ends of names, in one table), `_read`, `_shares` (fused and split matrices), `_write`,
`_recipes` (what a written tensor is made of), `_spelling` (a dialect as data), `_names`, `_peft` (its configuration).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Protocol, cast

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import CANONICAL, DIFFUSERS, Names
from sdops.dialects._read import Contents, Reading
from sdops.dialects._recipes import Block, Recipe, Values
from sdops.dialects._suffixes import split
from sdops.dialects._write import Written
from sdops.errors import UsageError

__all__ = [
    "CANONICAL",
    "DIFFUSERS",
    "ORDER",
    "Block",
    "Contents",
    "Dialect",
    "Names",
    "Reading",
    "Recipe",
    "Values",
    "Written",
    "best",
    "dialect",
    "split",
]

# Of two that fit equally well, the earlier one is meant.
ORDER = (
    "cloneofsimo",
    "xlabs",
    "peft",
    "diffusers_old",
    "onetrainer",
    "lycoris",
    "kohya",
    "comfy",
    "diffusers",
    "bfl",
)


class Dialect(Protocol):
    """What every module of the shelf offers."""

    def score(self, keys: Collection[str]) -> float:
        """Which share of a file's names is spelled this way."""

    def stems(self, names: Names) -> Mapping[str, Target]:
        """Every name of a layer -> the layer."""

    def read(self, file: Contents, names: Names) -> Reading:
        """The file's patches."""

    def write(self, adapter: Adapter, names: Names, values: Values) -> Written:
        """The file to be."""


def dialect(name: str) -> Dialect:
    """A dialect by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in ORDER:
        raise UsageError(f"there is no dialect `{name}`", hint=f"dialects: {' '.join(sorted(ORDER))}", name=name)
    return cast("Dialect", import_module(f"{__name__}.{name}"))


def best(keys: Collection[str]) -> str | None:
    """The dialect that most of the names are spelled in; None if no name is of any."""
    scores = {name: dialect(name).score(keys) for name in ORDER}
    winner = max(ORDER, key=lambda name: scores[name])
    return winner if scores[winner] > 0 else None
