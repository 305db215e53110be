"""What a conversion of an adapter to another family tells: how much of each layer it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdops.report import Report, Section
from sdops.text import count

if TYPE_CHECKING:
    from sdops.verbs._convert_family import Layer

_EXACT = 1e-10  # of the energy


def add_layers(report: Report, layers: Sequence[Layer]) -> None:
    """Add the captured energy, on the whole and by layer."""
    energy = math.fsum(layer.energy for layer in layers)
    captured = 1 - math.fsum(layer.lost for layer in layers) / energy if energy else 1.0
    report.data["captured"] = captured
    report.data["layers"] = [
        {
            "layer": str(layer.patch.target),
            "family": layer.patch.family,
            "rank": layer.rank,
            "kept": layer.is_kept,
            "captured": layer.captured,
        }
        for layer in layers
    ]
    changed = [layer for layer in layers if not layer.is_kept]
    exact = sum(layer.lost <= _EXACT * layer.energy for layer in changed)
    said = f"{count(len(changed), 'layer')}, {exact:,} of them without loss"
    rows = [("converted", said), ("captured", f"{captured:.2%} of the energy of the change")]
    each = [
        (
            str(layer.patch.target),
            layer.patch.family,
            "as it is" if layer.is_kept else str(layer.rank or "dense"),
            "" if layer.is_kept else f"{layer.captured:.2%}",
        )
        for layer in layers
    ]
    report.sections += [
        Section("", rows),
        Section("Layers", each, ("layer", "was", "rank>", "captured>"), detail=True),
    ]
    if captured < 1 - _EXACT:
        report.hints.append("a higher `--rank`, or `--energy 0.99`, keeps more of the change")
