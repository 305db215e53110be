"""guaneec/custom-diffusion-webui: safetensors whose header names an entry for every parameter, deltas or factors.

`json` in the header is {"meta": {"version": ...}, "entries": {parameter: "delta" | "delta_factors"}}; a delta is the
tensor of that name, factors are `parameter.US` [o, r] and `parameter.Vh` [r, i]. Words lie in files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import LAYER, Concepts, Edit, without_prefix
from sdops.errors import FormatError

KEY = "json"
PREFIX = "model.diffusion_model."
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


def write(factors: Mapping[str, tuple[Leaf, Leaf]]) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Names and header for factors of layers that are called as LDM calls them."""
    tensors: dict[str, Leaf] = {}
    for layer, (up, down) in factors.items():
        tensors |= {f"{PREFIX}{layer}.weight.US": up, f"{PREFIX}{layer}.weight.Vh": down}
    entries = {f"{PREFIX}{layer}.weight": "delta_factors" for layer in factors}
    return tensors, {KEY: json.dumps({"meta": {"version": VERSION}, "entries": entries})}
