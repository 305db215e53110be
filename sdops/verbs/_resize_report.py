"""What `resize` tells: ranks and errors, by component and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from sdops.core.patch import Adapter
from sdops.report import Report, Section
from sdops.text import count, duration, size

if TYPE_CHECKING:
    from sdops.verbs.resize import Layer


def report(adapter: Adapter, layers: Sequence[Layer], facts: Mapping[str, Any], seconds: float) -> Report:
    """Everything about a resize that was done, or would be."""
    found = Report("resize", result=[str(facts["output"])])
    changed = [layer for layer in layers if layer.after is not None]
    error = _error(layers)
    found.data = {
        **facts,
        "error": error,
        "changed": len(changed),
        "kept": len(layers) - len(changed),
        "layers": [_record(layer) for layer in layers],
    }
    wrote = "would write" if facts["dry_run"] else "wrote"
    took = "" if facts["dry_run"] else f" in {duration(seconds)}"
    rows = [
        (wrote, f"{facts['output']}, {size(facts['bytes'])} of {size(facts['bytes_before'])}{took}"),
        ("ranks", str(facts["rule"])),
        ("error", f"{error:.2%} of the change"),
        ("layers", f"{len(changed):,} changed, {len(layers) - len(changed):,} kept as they are"),
    ]
    found.sections = [Section("", rows), _by_component(layers), _each(layers)]
    found.warnings = list(adapter.notes)
    if adapter.unknown:
        found.warnings.append(f"{count(len(adapter.unknown), 'tensor')} not understood and left out")
    gone = sum(layer.after == 0 for layer in layers)
    if gone:
        found.warnings.append(f"{count(gone, 'layer')} left out: nothing of them is worth its room")
    whole = sum(not layer.is_product for layer in layers)
    if whole:
        found.warnings.append(f"{count(whole, 'patch')} kept as they are: DoRA, differences and the like have no rank")
    return found


def _error(layers: Sequence[Layer]) -> float:
    total = math.fsum(layer.energy for layer in layers)
    return math.sqrt(math.fsum(layer.error**2 for layer in layers) / total) if total else 0.0


def _record(layer: Layer) -> dict[str, Any]:
    return {
        "layer": str(layer.patch.target),
        "family": layer.patch.family,
        "rank_before": layer.before,
        "rank": layer.before if layer.after is None else layer.after,
        "kept": layer.after is None,
        "error": layer.relative,
    }


def _by_component(layers: Sequence[Layer]) -> Section:
    rows = []
    for component in dict.fromkeys(layer.patch.target.component for layer in layers):
        group = [layer for layer in layers if layer.patch.target.component == component]
        before = [layer.before for layer in group if layer.before]
        after = [rank for layer in group if (rank := layer.before if layer.after is None else layer.after) is not None]
        rows.append((component, f"{len(group):,}", _spread(before), _spread(after), f"{_error(group):.2%}"))
    return Section("Components", rows, ("", "layers>", "rank before>", "rank now>", "error>"))


def _spread(ranks: Sequence[int]) -> str:
    """Lowest, median and highest."""
    if not ranks:
        return ""
    low, middle, high = min(ranks), median(ranks), max(ranks)
    return str(low) if low == high else f"{low} / {middle:g} / {high}"


def _each(layers: Sequence[Layer]) -> Section:
    rows = [
        (
            str(layer.patch.target),
            layer.patch.family,
            "" if layer.before is None else str(layer.before),
            "as it is" if layer.after is None else str(layer.after),
            f"{layer.relative:.2%}" if layer.energy else "",
        )
        for layer in layers
    ]
    return Section("Layers", rows, ("layer", "family", "rank>", "now>", "error>"), detail=True)
