"""The factors that adobe-research/custom-diffusion compresses its files to: every weight is {`u`: [o, r], `v`: [r, i]}.

What is added to the model's weight is u @ v. Around them a file is laid out as `adobe` or `compvis`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import (
    LAYER,
    Concepts,
    Edit,
    Written,
    as_vectors,
    whole,
    without_prefix,
    words_in,
    words_of,
)

LAYERS, WORDS = "diffusers", "inside"
NAMES = {"torch": "compressed_{}.bin"}


def _entries(saved: Saved) -> dict[Any, Any]:
    for name in ("unet", "state_dict"):
        if type(saved.entries().get(name)) is dict:
            inner: dict[Any, Any] = saved.tree[name]
            return inner
    return saved.entries()


def _factors(item: Any) -> tuple[Leaf, Leaf] | None:
    """u and v if it is such a pair."""
    if type(item) is not dict or set(item) != {"u", "v"} or any(type(part) is not Leaf for part in item.values()):
        return None
    u, v = item["u"], item["v"]
    fits = len(u.spec.shape) == len(v.spec.shape) == 2 and u.spec.shape[1] == v.spec.shape[0]
    return (u, v) if fits else None


def sniff(saved: Saved) -> bool:
    """Such a pair for a layer of cross attention."""
    return any(
        type(name) is str and LAYER.fullmatch(without_prefix(name)) and _factors(item)
        for name, item in _entries(saved).items()
    )


def read(saved: Saved) -> Concepts:
    """Factors, and with them whole parameters that were not compressed."""
    edits: list[Edit] = []
    unknown: list[str] = []
    for name, item in _entries(saved).items():
        layer = LAYER.fullmatch(without_prefix(name)) if type(name) is str else None
        if layer and (factors := _factors(item)):
            edits.append(Edit(f"{layer['block']}.{layer['layer']}", layer["parameter"], "factors", factors))
        elif layer and type(item) is Leaf and (edit := whole(name, item)):
            edits.append(edit)
        elif name not in ("embed", "modifier_token"):
            unknown.append(str(name))
    words = words_of(saved.entries().get("modifier_token")) or words_in(_entries(saved).get("embed"))
    return Concepts(tuple(edits), words, tuple(unknown))


def holds(kinds: AbstractSet[str]) -> bool:
    """Factors, and with them whole parameters that were not compressed."""
    return "factors" in kinds and "delta" not in kinds


def write(edits: Sequence[Edit], words: Mapping[str, Leaf]) -> Written:
    """Pairs, laid out as `adobe` is."""
    found = {f"{edit.layer}.{edit.parameter}": _written(edit) for edit in edits}
    return Written({"unet": found, "modifier_token": as_vectors(words)})


def _written(edit: Edit) -> Leaf | dict[str, Leaf]:
    return dict(zip("uv", edit.tensors, strict=True)) if edit.kind == "factors" else edit.tensors[0]
