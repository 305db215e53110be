"""What the two torch layouts share: a dict whose integer keys are widths, each a pair of state dicts for k and v."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sdops.core.tree import Leaf, Saved
from sdops.hypernetworks._types import Network, chain


def pairs_of(saved: Saved) -> dict[int, list[dict[Any, Any]]]:
    """Width -> the state dicts; empty if the file is laid out in another way."""
    found = {key: value for key, value in saved.entries().items() if type(key) is int}
    fits = all(
        type(v) is list and len(v) == 2 and all(type(part) is dict and part for part in v) for v in found.values()
    )
    return found if fits else {}


def names_in(saved: Saved) -> set[str]:
    """All names of the state dicts."""
    return {str(name) for pair in pairs_of(saved).values() for part in pair for name in part}


def network(saved: Saved, layout: str, name: re.Pattern[str], first: int) -> Network:
    """A file of numbered widths whose layers are called as `name` says, counted from `first`."""
    pairs = {}
    for width, parts in pairs_of(saved).items():
        chains = []
        for which, part in zip("kv", parts, strict=True):
            layers: dict[int, dict[str, Leaf]] = {}
            for key, value in part.items():
                if (found := name.fullmatch(str(key))) and type(value) is Leaf:
                    layers.setdefault(int(found["index"]) - first, {})[found["part"]] = value
            chains.append(chain(layers, f"{width} {which}"))
        pairs[width] = (chains[0], chains[1])
    others = {str(key): value for key, value in saved.entries().items() if type(key) is not int}
    settings = {key: value for key, value in others.items() if is_plain(value)}
    own = settings.get("name")
    called = own if type(own) is str and own else saved.stem
    return Network(called, layout, pairs, settings, sorted(others.keys() - settings.keys()))


def is_plain(value: Any) -> bool:
    """A value that JSON can hold as it is."""
    if type(value) is list:
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (str, int, float, bool)


def tree(network: Network, spelled: str, first: int, settings: Mapping[str, Any]) -> dict[Any, Any]:
    """The dict to be saved; `spelled` has places for the number and the part."""
    made: dict[Any, Any] = {}
    for width, chains in network.pairs.items():
        made[width] = [
            {
                spelled.format(layer.index + first, part): leaf
                for layer in layers
                for part, leaf in (("weight", layer.weight), ("bias", layer.bias))
                if leaf is not None
            }
            for layers in chains
        ]
    return made | dict(settings)
