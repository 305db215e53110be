"""The difference of two models as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log10
from typing import TYPE_CHECKING

from sdops.core.compare import Measure
from sdops.report import Report
from sdops.text import count
from sdops.verbs import _html
from sdops.verbs._difference import KINDS, Difference, total
from sdops.verbs.diff import change as told
from sdops.verbs.diff import cosine, metadata

if TYPE_CHECKING:
    from sdops.verbs.diff import Compared

_COLDEST, _HOTTEST = -3, 0  # powers of ten of the relative change: the heat map's colours
_LEFT, _RIGHT = -4, 0  # the same: the histogram
_STEPS = 4  # its columns per power of ten
_ROWS = 40
_WHERE = {"only_a": "only in A", "only_b": "only in B", "changed": "another value"}
_VERDICTS = {"the same": "The tensors are the same.", "different": "The tensors differ."}
_LISTED = 2000


def page(found: Compared, report: Report) -> str:
    """The whole document."""
    a, b = found.a.origin.name, found.b.origin.name
    return _html.page(f"{a} -> {b}", _parts(found, report))


def _parts(found: Compared, report: Report) -> Iterator[_html.Html]:
    yield _html.heading(f"{found.a.origin.name} → {found.b.origin.name}", 1)
    verdict = _VERDICTS.get(found.verdict, f"The tensors have {found.verdict}.")
    yield _html.paragraph(verdict, "bad" if found.verdict == "different" else "good")
    yield _html.facts([row for row in report.sections[0].rows if row[0] != "result"])
    for text in report.warnings:
        yield _html.paragraph(text, "bad")
    for section in report.sections:
        if section.heading == "Adapters":
            yield _html.heading(section.heading)
            yield _html.table(section.columns, section.rows)
    if found.changed:
        yield from _pictures(found)
        yield from _most_changed(found.changed)
    yield from _lists(found)


def _pictures(found: Compared) -> Iterator[_html.Html]:
    kinds = [kind for kind in KINDS if any(kind in cells for cells in found.blocks.values())]
    yield _html.heading("Change by block")
    yield _html.paragraph(
        "Relative change |B - A| / |A| of the tensors that differ, by block and by what they do: attention to the image"
        " (self) and to the text (cross), feed-forward layers, embeddings and modulation, convolutions, norms."
        " The colour is logarithmic, from 0.1 % to 100 %.",
        "dim",
    )
    rows = [
        (block, [_cell(total(cells.values())), *(_cell(cells.get(kind)) for kind in kinds)])
        for block, cells in found.blocks.items()
    ]
    yield _html.heat_map(["all", *kinds], rows)
    if known := [r.measure.relative for r in found.changed if r.measure and not r.measure.broken]:
        yield _html.heading("How much the tensors changed")
        yield _histogram([change for change in known if change is not None])


def _cell(measure: Measure | None) -> _html.Heat | None:
    if measure is None:
        return None
    if not measure.changed:
        return _html.Heat(None, "=", "the same")
    title = f"cosine {cosine(measure.cosine) or 'unknown'}, largest change {measure.largest:.4g}"
    change = measure.relative
    if measure.broken:
        return _html.Heat(1.0, "NaN", title)
    if change is None:
        return _html.Heat(1.0, "≠", title)
    return _html.Heat(
        _position(change, _COLDEST, _HOTTEST) ** 1.5, "<0.01%" if change < 1e-4 else _percent(100 * change), title
    )


def _percent(number: float) -> str:
    """Two digits at least: 0.84%, 9.0%, 12%."""
    return f"{number:#.2g}%" if number < 9.95 else f"{number:.0f}%"


def _position(change: float, low: int, high: int) -> float:
    """Where a number lies between two powers of ten, logarithmically: 0 to 1 if it does."""
    return (log10(max(change, 10.0**low)) - low) / (high - low)


def _histogram(changes: Sequence[float]) -> _html.Html:
    counts = [0] * ((_RIGHT - _LEFT) * _STEPS)
    for change in changes:
        counts[min(int(_position(change, _LEFT, _RIGHT) * len(counts)), len(counts) - 1)] += 1
    ends = [f"{100 * 10.0**power:g}%" for power in range(_LEFT, _RIGHT + 1)]
    ends = [f"≤{ends[0]}", *ends[1:-1], f"≥{ends[-1]}"]
    return _html.histogram(counts, ends, f"{count(len(changes), 'tensor')} by relative change, logarithmic scale")


def _most_changed(changed: list[Difference]) -> Iterator[_html.Html]:
    top = changed[:_ROWS]
    yield _html.heading("Most changed tensors")
    highest = max((r.measure.relative or 0.0 for r in top if r.measure), default=0.0) or 1.0
    rows: list[list[_html.Cell]] = [
        [
            r.key,
            _html.bar((m.relative or 0.0) / highest),
            told(m),
            cosine(m.cosine),
            f"{m.largest:.3g}",
            " → ".join(dict.fromkeys(str(spec) for spec in r.specs)),
        ]
        for r in top
        if (m := r.measure)
    ]
    yield _html.table(("tensor", "", "change>", "cosine>", "largest>", "dtype, shape"), rows)
    if len(changed) > _ROWS:
        yield _html.paragraph(f"and {len(changed) - _ROWS:,} more", "dim")


def _lists(found: Compared) -> Iterator[_html.Html]:
    lists = {
        "of another shape": [r.key for r in found.records if r.state == "shape"],
        "of equal values, stored in another dtype or shape": [r.key for r in found.records if r.state == "equal"],
        "of equal values, but for rounding to the narrower dtype": [
            r.key for r in found.records if r.state == "rounded"
        ],
        f"only in {found.a.origin.name}": found.only_a,
        f"only in {found.b.origin.name}": found.only_b,
    }
    if any(lists.values()):
        yield _html.heading("Tensors that have no equal")
    for what, keys in lists.items():
        if keys:
            rest = [f"... and {len(keys) - _LISTED:,} more"] if len(keys) > _LISTED else []
            yield _html.folded(f"{count(len(keys), 'tensor')} {what}", keys[:_LISTED] + rest)
    names = [f"{key}: {_WHERE[what]}" for what, keys in metadata(found).items() for key in keys]
    if names:
        yield _html.heading("Metadata")
        yield _html.folded(f"{count(len(names), 'entry')} that differ", names)
