"""sdops' own form of hypernetworks: `hypernetwork.{width}.{k|v}.linear.{j}.weight`, the settings as JSON in the header.

Nothing can be executed when it is opened, and `a1111` and `novelai` files come back from it bit for bit.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sdops.core.tree import Leaf, Saved
from sdops.errors import FormatError
from sdops.hypernetworks._types import Network, Written, chain

ENDING, CONTAINER = ".safetensors", "safetensors"
_NAME = re.compile(r"hypernetwork\.(?P<width>\d+)\.(?P<which>[kv])\.linear\.(?P<index>\d+)\.(?P<part>weight|bias)")
_SETTINGS, _LAYOUT, _KIND = "hypernetwork.settings", "hypernetwork.layout", "sdops.kind"


def sniff(saved: Saved) -> bool:
    """Nothing but names of that kind."""
    names = saved.entries()
    return bool(names) and all(_NAME.fullmatch(str(name)) for name in names)


def read(saved: Saved) -> Network:
    """Layers from the names, settings from the header.

    Raises:
        FormatError: a chain is missing, or the settings are no JSON object.
    """
    layers: dict[int, dict[str, dict[int, dict[str, Leaf]]]] = {}
    for name, leaf in saved.entries().items():
        if found := _NAME.fullmatch(str(name)):
            pair = layers.setdefault(int(found["width"]), {"k": {}, "v": {}})
            pair[found["which"]].setdefault(int(found["index"]), {})[found["part"]] = leaf
    order = _order(saved, layers)
    pairs = {w: (chain(layers[w]["k"], f"{w} k"), chain(layers[w]["v"], f"{w} v")) for w in order}
    settings = _settings(saved)
    own = settings.get("name")
    layout = saved.metadata.get(_LAYOUT, "a1111")
    return Network(own if type(own) is str and own else saved.stem, layout, pairs, settings)


def _order(saved: Saved, layers: dict[int, Any]) -> list[int]:
    """The widths as the original file had them; files of other programs may not say it."""
    said = [int(width) for width in saved.metadata.get("hypernetwork.widths", "").split(",") if width.isdecimal()]
    return said if set(said) == set(layers) else sorted(layers)


def _settings(saved: Saved) -> dict[str, Any]:
    try:
        found = json.loads(saved.metadata.get(_SETTINGS, "{}"))
    except (ValueError, RecursionError):
        found = None
    if type(found) is not dict:
        raise FormatError(f"`{_SETTINGS}` in the header is no JSON object", hint="make the file again from its `.pt`")
    return found


def write(network: Network) -> Written:
    """Tensors by name; every setting goes into the header."""
    named = {
        f"hypernetwork.{width}.{which}.linear.{layer.index}.{part}": leaf
        for width, chains in network.pairs.items()
        for which, layers in zip("kv", chains, strict=True)
        for layer in layers
        for part, leaf in (("weight", layer.weight), ("bias", layer.bias))
        if leaf is not None
    }
    metadata = {
        "format": "pt",
        _KIND: "hypernetwork",
        _LAYOUT: network.layout,
        "hypernetwork.widths": ",".join(map(str, network.pairs)),
        _SETTINGS: json.dumps(network.settings, ensure_ascii=False),
    }
    return Written(named, metadata)
