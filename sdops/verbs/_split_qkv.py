"""Detect a LoRA that kohya's trainer weakened when it joined q, k and v (`split_qkv`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product

from sdops.core.patch import Patch
from sdops.core.source import Source
from sdops.verbs._adapter_source import values_of

_PARTS = {"qkv": (3, 3), "linear1": (4, 7)}  # last word of a Flux layer -> parts, and rows in units of the width
_EDGES = {3: (0, 1, 2, 3), 4: (0, 1, 2, 3, 7)}


def weakened(source: Source, patches: tuple[Patch, ...]) -> str | None:
    """What to tell the user of a file whose q, k and v were trained apart and joined when saved; None if it is not one.

    The joined `up` is block-diagonal, with the factors of q, k and v one after the other, so its rank is three times
    (in single blocks four times) theirs; but alpha stayed as it was, and every program that divides it by the rank
    applies a third (a quarter) of what was trained (kohya-ss/sd-scripts#2204).
    """
    if not _says_so(source.metadata):
        return None
    joined = [patch for patch in patches if _is_joined(source, patch)]
    if not joined:
        return None
    return (
        f"trained with `split_qkv` and joined when it was saved, without changing alpha: in {len(joined)} layers "
        "programs apply a third (of `linear1` a quarter) of the trained strength; a higher strength for `*qkv` and "
        "`*linear1` makes up for it"
    )


def _says_so(metadata: Mapping[str, str]) -> bool:
    try:
        said = json.loads(metadata.get("ss_network_args", ""))
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and str(said.get("split_qkv", "")).lower() == "true"


def _is_joined(source: Source, patch: Patch) -> bool:
    """Whether a layer's `up` [o, r] is zero outside of its diagonal blocks."""
    parts, units = _PARTS.get(patch.target.module.rpartition(".")[2], (0, 0))
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
