"""Detect and repair a LoRA that kohya's trainer weakened when it joined q, k and v (`split_qkv`).

The joined `up` is block-diagonal, with the factors of q, k and v one after the other, so its rank is three times (of
`linear1` four times) theirs; but alpha stayed as it was, and every program that divides it by the rank applies a third
(a quarter) of what was trained (kohya-ss/sd-scripts#2204).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import product

from sdops.core.patch import Patch
from sdops.core.source import Source
from sdops.verbs._adapter_source import values_of

_ARGS, _WORD = "ss_network_args", "split_qkv"
_PARTS = {"qkv": (3, 3), "linear1": (4, 7)}  # last word of a Flux layer -> parts, and rows in units of the width
_EDGES = {3: (0, 1, 2, 3), 4: (0, 1, 2, 3, 7)}


def weakened(source: Source, patches: Iterable[Patch]) -> dict[str, float]:
    """The alphas that are too small, by tensor name, as they should be."""
    if not _says_so(source.metadata):
        return {}
    return {
        patch.parts["lora_alpha"]: float(values_of(source, patch.parts["lora_alpha"])[0, 0]) * _parts(patch)[0]
        for patch in patches
        if _is_joined(source, patch)
    }


def warning(source: Source, patches: Iterable[Patch]) -> str | None:
    """What to tell the user of such a file; None if it is not one."""
    found = weakened(source, patches)
    if not found:
        return None
    return (
        f"trained with `{_WORD}` and joined when it was saved, without changing alpha: in {len(found)} layers programs "
        f"apply a third (of `linear1` a quarter) of the trained strength; `sdops fix {source.name}` puts it right"
    )


def without_word(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header of a repaired file: it must not be repaired again."""
    args = {name: value for name, value in json.loads(metadata[_ARGS]).items() if name != _WORD}
    return {**metadata, _ARGS: json.dumps(args)}


def _says_so(metadata: Mapping[str, str]) -> bool:
    try:
        said = json.loads(metadata.get(_ARGS, ""))
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and str(said.get(_WORD, "")).lower() == "true"


def _parts(patch: Patch) -> tuple[int, int]:
    return _PARTS.get(patch.target.module.rpartition(".")[2], (0, 0))


def _is_joined(source: Source, patch: Patch) -> bool:
    """Whether a layer's `up` [o, r] is zero outside of its diagonal blocks."""
    parts, units = _parts(patch)
    if not parts or patch.family != "lora" or patch.target.share is not None or "lora_alpha" not in patch.parts:
        return False
    rows, rank = source.specs[patch.parts["up"]].shape[:2]
    if rank % parts or rows % units:
        return False
    up = values_of(source, patch.parts["up"])
    edges, own = [edge * rows // units for edge in _EDGES[parts]], rank // parts
    return not any(
        up[edges[i] : edges[i + 1], own * j : own * (j + 1)].any() for i, j in product(range(parts), repeat=2) if i != j
    )
