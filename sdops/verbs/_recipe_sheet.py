"""A contact sheet in numbers: how far each result of a sweep is from every model that went in, in all and by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from sdops.archs.blocks import BASE, block_of, block_slots
from sdops.archs.detect import Detection, component_of, detect
from sdops.core.compare import Measure, Pair, compare
from sdops.core.run import default_jobs
from sdops.core.source import Source
from sdops.formats import open_source
from sdops.report import HEAT, Progress, Report, Section
from sdops.text import count, duration
from sdops.verbs._recipe_inputs import Found
from sdops.verbs._recipe_text import Scalar, spelled

FARTHEST = 1.0  # the relative distance that is shown hottest at most


@dataclass(frozen=True, slots=True)
class Cell:
    """One result.

    Attributes:
        settings: The parameters that were set.
        output: The file.
        norm: Euclidean norm of all its floating tensors; 0 before it is measured.
        distances: Input -> block -> ||result - input|| / ||input||; "" for all blocks together.
    """

    settings: Mapping[str, Scalar]
    output: Path
    norm: float
    distances: Mapping[str, Mapping[str, float]]


def measured(
    settings: Mapping[str, Scalar], output: Path, inputs: Mapping[str, Found], jobs: int | None, progress: Progress
) -> Cell:
    """Measure a result against every input that has its tensors.

    Args:
        settings: What it was made with.
        output: The result.
        inputs: The recipe's inputs.
        jobs: Threads.
        progress: Called as `progress(label, total_bytes)`.
    """
    result = open_source(output)
    try:
        detection = detect(result.specs)
        distances: dict[str, dict[str, float]] = {}
        norm = 0.0
        for name, one in inputs.items():
            pairs = _pairs(one.open(), result)
            if not pairs:
                continue
            with progress(f"measuring {output.name}", sum(pair.nbytes for pair in pairs)) as advance:
                found = compare(pairs, jobs=jobs or default_jobs(), progress=advance)
            blocks = _by_block(detection, _with_squares(found, pairs))
            distances[name] = {block: _relative(measure) for block, measure in blocks.items()}
            norm = norm or sqrt(blocks[""].square_b)
        return Cell(settings, output, norm, distances)
    finally:
        result.close()


def _pairs(model: Source, result: Source) -> list[Pair]:
    """The floating tensors that both have in one shape; none if these are few: then it is no model of this kind."""
    floats = [key for key, spec in result.specs.items() if spec.is_float]
    both = [key for key in floats if key in model.specs and model.specs[key].shape == result.specs[key].shape]
    both = [key for key in both if model.specs[key].is_float]
    return [Pair(key, model, key, result, key) for key in both] if 2 * len(both) > len(floats) else []


def _with_squares(found: Mapping[str, Measure], pairs: Sequence[Pair]) -> dict[str, Measure]:
    """Tensors with equal bytes have not been summed up: they are, against nothing."""
    missing = [pair for pair in pairs if found[pair.name].same_bytes]
    again = {pair.name: _squares(pair) for pair in missing}
    return {name: again.get(name, measure) for name, measure in found.items()}


def _squares(pair: Pair) -> Measure:
    import numpy as np

    from sdops.core.precision import FORMATS, decode
    from sdops.core.source import read

    spec = pair.specs[0]
    values = decode(np.frombuffer(read(pair.a, pair.key_a), FORMATS[spec.dtype].raw), spec.dtype)
    square = float(np.dot(values, values))
    return Measure(spec.numel, same_bytes=True, square_a=square, square_b=square, product=square)


def _by_block(detection: Detection, found: Mapping[str, Measure]) -> dict[str, Measure]:
    """Blocks in the model's order, components behind; "" is all of it."""
    blocks = {"": Measure(0)} | {slot: Measure(0) for slot in block_slots(detection) if slot != BASE}
    for key, measure in found.items():
        slot = block_of(detection, key)
        name = (component_of(detection, key) or "other") if slot in (BASE, "") else slot
        blocks.setdefault(name, Measure(0)).add(measure)
        blocks[""].add(measure)
    return {name: measure for name, measure in blocks.items() if measure.elements}


def _relative(measure: Measure) -> float:
    return sqrt(measure.square_change / measure.square_a) if measure.square_a else 0.0


# ---------------------------------------------------------------------------------------------------------- the report


def sheet_report(name: str, found: Sequence[Cell], kept: Sequence[Path], seconds: float, *, dry_run: bool) -> Report:
    """The report of a sweep.

    Args:
        name: The recipe's.
        found: All results.
        kept: Those of them that were there already.
        seconds: What it took.
        dry_run: Whether nothing was written.
    """
    report = Report("build", result=[str(cell.output) for cell in found])
    report.data = {
        "recipe": name,
        "dry_run": dry_run,
        "seconds": round(seconds, 3),
        "cells": [_facts(cell) | {"kept": cell.output in kept} for cell in found],
    }
    knobs, inputs = list(found[0].settings), list(found[0].distances)
    verb = "would write" if dry_run else "wrote"
    took = "" if dry_run else f" in {duration(seconds)}"
    wrote = [(verb, f"{count(len(found) - len(kept), 'file')}{took}")]
    wrote += [("kept", f"{count(len(kept), 'file')} of an earlier run")] if kept else []
    rows = [
        [*(spelled(value) for value in cell.settings.values()), *_numbers(cell), str(cell.output)] for cell in found
    ]
    columns = [*(f"{knob}>" for knob in knobs), *(["norm>"] if inputs else [])]
    columns += [*(f"from {each}>" for each in inputs), "file"]
    report.sections = [
        Section("", [("recipe", name), *wrote]),
        Section("Distances ||result - input|| / ||input||" if inputs else "", rows, columns),
        *(_blocks(found, each) for each in inputs),
    ]
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to build")
    return report


def _facts(cell: Cell) -> dict[str, Any]:
    return {
        "settings": dict(cell.settings),
        "output": str(cell.output),
        "norm": cell.norm,
        "distances": {
            name: {"all": blocks.get("", 0.0), "blocks": {block: one for block, one in blocks.items() if block}}
            for name, blocks in cell.distances.items()
        },
    }


def _numbers(cell: Cell) -> list[str]:
    if not cell.distances:
        return []
    return [f"{cell.norm:.6g}", *(f"{blocks['']:.4g}" for blocks in cell.distances.values())]


def _blocks(found: Sequence[Cell], name: str) -> Section:
    """A heat map: a row for each result, a shade for each block."""
    most = max((one for cell in found for block, one in cell.distances[name].items() if block), default=0.0) or FARTHEST
    blocks = [block for block in found[0].distances[name] if block]
    rows = []
    for cell in found:
        shades = "".join(HEAT[min(int(len(HEAT) * cell.distances[name][block] / most), 4)] for block in blocks)
        rows.append([" ".join(spelled(value) for value in cell.settings.values()), shades])
    heading = f"From {name} by block, {blocks[0]} to {blocks[-1]}; hottest {most:.3g}" if blocks else ""
    return Section(heading, rows, heat=True)
