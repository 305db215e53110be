"""guaneec/custom-diffusion-webui: safetensors whose header names an entry for every parameter, deltas or factors.

`json` in the header is {"meta": {"version": ...}, "entries": {parameter: "delta" | "delta_factors"}}; a delta is the
tensor of that name, factors are `parameter.US` [o, r] and `parameter.Vh` [r, i]. Words lie in files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import LAYER, LDM, Concepts, Edit, Written, without_prefix
from sdops.errors import FormatError

LAYERS, WORDS = "canonical", "a1111"
NAMES = {"safetensors": "{}.delta.safetensors"}
KEY = "json"
VERSION = "0.2.0"


def _entries(saved: Saved) -> dict[str, Any]:
    try:
        found = json.loads(saved.metadata.get(KEY, ""))
    except (ValueError, RecursionError):
        return {}
    entries = found.get("entries") if type(found) is dict else None
    return entries if type(entries) is dict else {}


def sniff(saved: Saved) -> bool:
    """The header's entries."""
    return bool(_entries(saved))


def read(saved: Saved) -> Concepts:
    """Every entry.

    Raises:
        FormatError: an entry's tensors are missing.
    """
    tensors, edits, used = saved.entries(), [], set()
    for name, kind in _entries(saved).items():
        found = LAYER.fullmatch(without_prefix(name))
        keys = (name,) if kind == "delta" else (f"{name}.US", f"{name}.Vh") if kind == "delta_factors" else ()
        if found is None or not keys:
            continue
        if missing := [key for key in keys if type(tensors.get(key)) is not Leaf]:
            raise FormatError(
                f"the header names `{name}`, but there is no `{missing[0]}`",
                hint="the file was not saved completely; get it again",
            )
        used |= set(keys)
        parts = tuple(tensors[key] for key in keys)
        layer, parameter = f"{found['block']}.{found['layer']}", found["parameter"]
        edits.append(Edit(layer, parameter, "delta" if kind == "delta" else "factors", parts))
    return Concepts(tuple(edits), (), tuple(str(key) for key in tensors if key not in used))


def holds(kinds: AbstractSet[str]) -> bool:
    """Whatever is added."""
    return "whole" not in kinds


def write(edits: Sequence[Edit], words: Mapping[str, Leaf]) -> Written:
    """Deltas and factors, with their entries in the header."""
    del words  # they lie beside it
    tensors, entries = dict[str, Leaf](), {}
    for edit in edits:
        name = f"{LDM}{edit.layer}.{edit.parameter}"
        keys = (name,) if edit.kind == "delta" else (f"{name}.US", f"{name}.Vh")
        tensors |= zip(keys, edit.tensors, strict=True)
        entries[name] = "delta" if edit.kind == "delta" else "delta_factors"
    return Written(tensors, {KEY: json.dumps({"meta": {"version": VERSION}, "entries": entries})})
