"""Merge slots: which block of its model a key belongs to.

The convention of the merge tools: `time_embed` and `label_emb` go with IN00, the output layers with the last OUT, the
VAE has a slot of its own in SDXL, and whatever has no slot is BASE. Both layouts of a model have the same slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache

from sdops.archs.detect import Component, Detection, component_of
from sdops.archs.junk import ema_key_of, is_ema, is_position_ids, is_schedule
from sdops.archs.tables import Table
from sdops.core.template import alternatives

__all__ = [
    "BASE",
    "block_of",
    "block_slots",
    "component_of",
    "ema_key_of",
    "is_ema",
    "is_position_ids",
    "is_schedule",
    "slot_in",
    "slots_in",
]

BASE = "BASE"


def block_slots(detection: Detection) -> list[str]:
    """The slots of the model in their usual order, BASE first; only BASE where the family has no block table."""
    main = detection.main
    if main is None or not main.table.slots:
        return [BASE]
    return list(_slots(main.table, _frozen(main)))


def block_of(detection: Detection, key: str) -> str:
    """The slot of a key. A moving-average key has the slot of the weight it averages."""
    main = detection.main
    if main is None or not main.table.slots:
        return BASE
    owner = component_of(detection, key)
    if owner == "ema":
        return _ema_slots(detection).get(key, BASE)
    return slot_in(main.table, main.ranges, owner, key.removeprefix(main.prefix))


def slot_in(table: Table, ranges: Mapping[str, int], component: str, name: str) -> str:
    """The slot of a name without prefix, in the model whose denoiser `table` describes.

    Args:
        table: Of the denoiser.
        ranges: How far its named ranges count.
        component: What the name belongs to.
        name: A tensor or a layer.
    """
    by_name = _by_name(table, tuple(sorted(ranges.items())))
    if component != table.name:
        return by_name.get(f"@{component}", BASE)
    while name:
        if name in by_name:
            return by_name[name]
        name = name.rpartition(".")[0]
    return BASE


def slots_in(table: Table, ranges: Mapping[str, int]) -> list[str]:
    """The slots of a denoiser in their usual order; only BASE where it has no block table."""
    return list(_slots(table, tuple(sorted(ranges.items())))) if table.slots else [BASE]


@lru_cache(maxsize=8)
def _ema_slots(detection: Detection) -> dict[str, str]:
    """The slot of every moving-average key of the main component."""
    main = detection.main
    return {ema_key_of(key): block_of(detection, key) for key in main.keys} if main else {}


def _frozen(component: Component) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(component.ranges.items()))


@cache
def _slots(table: Table, ranges: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return tuple(slot for template in table.slots.split() for slot in alternatives(template, dict(ranges), width=2))


@cache
def _by_name(table: Table, ranges: tuple[tuple[str, int], ...]) -> dict[str, str]:
    """Name, or beginning of names up to a dot, -> slot; `@vae` -> slot of a whole component."""
    slot_of: dict[str, str] = {}
    for line in table.blocks.splitlines():
        template, *patterns = line.split() or [""]
        slots = alternatives(template, dict(ranges), width=2)
        for pattern in patterns:
            names = alternatives(pattern, dict(ranges))
            slot_of |= zip(names, slots * len(names) if len(slots) == 1 else slots, strict=len(slots) > 1)
    return slot_of
