"""What `extract` tells: beforehand and when it is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sdops.report import Report, Section
from sdops.text import count, duration, size

if TYPE_CHECKING:
    from sdops.verbs._extract_factors import Layer
    from sdops.verbs._extract_pairs import Pair, Pairs

FOREIGN = 0.3  # ||tuned - base|| / ||base|| that no fine-tune reaches in most of its layers
_LARGE = 0.5  # of the bytes of the layers: an adapter of this size is hardly worth having
_ENOUGH = 0.5  # of the energy: less than this is worth a hint

_KINDS = {"linear": "linear", "conv": "convolution", "te": "text encoder", "norm": "norm", "bias": "bias"}


def dry_report(output: Path, found: Pairs, vectors: Sequence[Pair], wishes: Mapping[str, Any], to: str) -> Report:
    """What would be done."""
    pairs = [*found.layers, *vectors]
    nbytes = sum(pair.nbytes for pair in pairs)
    report = Report("extract", result=[str(output)])
    report.data = {
        "output": str(output),
        "dry_run": True,
        "dialect": to,
        "settings": dict(wishes),
        "layers": _counts(pairs),
        "left_out": dict(+found.left_out),
        "read_bytes": nbytes,
    }
    rows = [("output", str(output)), ("dialect", to), ("ranks", _words(wishes)), ("reads", size(nbytes))]
    rows += [("layers", count(number, name)) for name, number in _counts(pairs).items()]
    report.sections = [Section("Would extract", rows), _left_out(found)]
    report.warnings = list(found.warnings)
    return report


def done_report(
    output: Path, nbytes: int, seconds: float, layers: Sequence[Layer], found: Pairs, wishes: Mapping[str, Any]
) -> Report:
    """What was done, layer by layer and on the whole."""
    kept = [layer for layer in layers if layer.rank]
    weights = [layer for layer in layers if layer.pair.kind not in ("norm", "bias")]
    whole = captured(weights)
    report = Report("extract", result=[str(output)])
    report.data = {
        "output": str(output),
        "bytes": nbytes,
        "settings": dict(wishes),
        "captured": whole,
        "error": math.sqrt(max(1 - whole, 0)),
        "kept": len(kept),
        "skipped": len(layers) - len(kept),
        "left_out": dict(+found.left_out),
        "layers": [_record(layer) for layer in layers],
    }
    rows = [
        ("wrote", f"{output}, {size(nbytes)} in {duration(seconds)}"),
        ("ranks", _words(wishes)),
        ("captured", f"{whole:.2%} of the energy of the change, error {report.data['error']:.2%}"),
        ("layers", f"{len(kept):,} kept, {len(layers) - len(kept):,} without a change above rounding"),
    ]
    report.sections = [Section("", rows), _by_kind(layers), _left_out(found), _each(layers)]
    report.warnings = list(found.warnings)
    _advise(report, weights, nbytes, whole)
    return report


def captured(layers: Iterable[Layer]) -> float:
    """Share of the energy of all layers together that is kept."""
    pairs = [(layer.energy, layer.residual) for layer in layers]
    total = math.fsum(energy for energy, _ in pairs)
    return 1 - math.fsum(residual for _, residual in pairs) / total if total else 1.0


def _advise(report: Report, weights: Sequence[Layer], nbytes: int, whole: float) -> None:
    """What the numbers say about the choice of base and rank."""
    foreign = sum(layer.change > FOREIGN for layer in weights)
    if foreign * 2 > len(weights):
        report.warnings.append(
            f"{foreign:,} of {len(weights):,} layers differ by more than {FOREIGN:.0%} of their size: "
            "this is hardly the base that the model was made from"
        )
    if nbytes > _LARGE * sum(layer.pair.tuned.nbytes for layer in weights):
        report.hints.append("`--max-rank 64` or `--budget 200MB` makes a smaller file of nearly the same effect")
    elif whole < _ENOUGH:
        report.hints.append("a higher `--rank`, or a larger `--budget`, keeps more of the change")


def _record(layer: Layer) -> dict[str, Any]:
    return {
        "component": layer.pair.target.component,
        "module": layer.pair.target.module,
        "kind": layer.pair.kind,
        "rank": layer.rank,
        "dense": layer.dense,
        "captured": layer.captured,
        "change": layer.change,
    }


def _by_kind(layers: Sequence[Layer]) -> Section:
    rows = []
    for kind, name in _KINDS.items():
        group = [layer for layer in layers if layer.pair.kind == kind]
        if group:
            factored = [layer.rank for layer in group if layer.rank and not layer.dense]
            dense = sum(layer.dense for layer in group)
            spread = f"{min(factored)} / {median(factored):g} / {max(factored)}" if factored else ""
            rows.append((name, f"{len(factored):,}", spread, f"{dense:,}" if dense else "", f"{captured(group):.2%}"))
    return Section("Kind of layer", rows, ("", "factored>", "rank min / median / max>", "dense>", "captured>"))


def _left_out(found: Pairs) -> Section:
    return Section("Left out", [(why, f"{number:,}") for why, number in (+found.left_out).items()])


def _each(layers: Sequence[Layer]) -> Section:
    rows = [
        (
            str(layer.pair.target),
            "dense" if layer.dense else str(layer.rank),
            f"{layer.captured:.2%}",
            f"{layer.change:.2e}",
        )
        for layer in layers
    ]
    return Section("Layers", rows, ("layer", "rank>", "captured>", "change>"), detail=True)


def _counts(pairs: Iterable[Pair]) -> dict[str, int]:
    return dict(Counter(_KINDS[pair.kind] for pair in pairs))


def _words(wishes: Mapping[str, Any]) -> str:
    """The rank rule as the command line spells it."""
    rules = ("rank", "energy", "ratio", "absolute", "quantile", "budget")
    said = [f"{name} {size(wishes[name]) if name == 'budget' else wishes[name]}" for name in rules if name in wishes]
    said = said or ["above rounding noise"]
    said += [f"{name.partition('_')[0]} {wishes[name]}" for name in ("conv_rank", "te_rank") if name in wishes]
    said += [f"at most {wishes['max_rank']}"] if "max_rank" in wishes else []
    return ", ".join(said)
