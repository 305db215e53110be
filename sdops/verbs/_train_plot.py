"""The curves of runs: for the terminal in characters, for the browser as one page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from sdops.report import Report, Section
from sdops.training.log import read
from sdops.verbs import _html

_WIDE, _HIGH = 64, 12  # characters of a curve in the terminal
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille character, by row and column
_TITLES = {
    "loss": "Loss, running mean",
    "validation": "Loss with fixed noise",
    "norm": "Norm of the gradient",
    "rate": "Share of the learning rate",
}
_COLOURS = ("#d4691b", "#2b6cb0", "#1a7f4b", "#8e44ad", "#b3261e")
_POINTS = 2000  # of a curve on a page, at most
_MEAN = 0.05  # share of a run that the running mean looks back


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (step, value) of one quantity of one run."""

    name: str
    points: Sequence[tuple[float, float]]


def plot(logs: Sequence[Path], output: Path | None) -> Report:
    """The curves of logs.

    Raises:
        FormatError: one is no log.
        OutputError: the page cannot be written.
    """
    entries = {log.stem: read(log) for log in logs}
    charts = {key: [Curve(name, _points(lines, key)) for name, lines in entries.items()] for key in _TITLES}
    charts = {key: [curve for curve in curves if len(curve.points) > 1] for key, curves in charts.items()}
    sections = [Section("Runs", [_summary(name, lines) for name, lines in entries.items()],
                        ["run", "method", "steps>", "loss at first>", "loss now>"])]  # fmt: skip
    for key in ("validation", "loss"):
        sections += [
            Section(f"{_TITLES[key]}: {curve.name}", [[line] for line in _characters(curve)]) for curve in charts[key]
        ]
    if output is not None:
        _write(output, entries, charts)
        sections.append(Section("Page", [["wrote", str(output)]]))
    data = {
        "runs": {
            name: {key: [list(p) for p in _points(lines, key, mean=False)] for key in _TITLES}
            for name, lines in entries.items()
        },
        "output": None if output is None else str(output),
    }
    return Report("train plot", data, sections, [] if output is None else [str(output)])


def _points(lines: Sequence[dict[str, Any]], key: str, *, mean: bool = True) -> list[tuple[float, float]]:
    found = [
        (float(line["step"]), float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and isfinite(line[key]) and "step" in line
    ]
    return _averaged(found) if key == "loss" and mean else found


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over a share of the run: single losses depend most on the noise step that was drawn."""
    keep = 1 - 1 / max(1.0, _MEAN * len(points))
    total = weight = 0.0
    found = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        found.append((step, total / weight))
    return found


def _summary(name: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    fixed = _points(lines, "validation") or _points(lines, "loss")
    steps = max((int(line.get("step", 0)) for line in lines), default=0)
    ends = [f"{fixed[0][1]:.5f}", f"{fixed[-1][1]:.5f}"] if fixed else ["", ""]
    return [name, str(lines[0].get("method", "")), f"{steps:,}", *ends]


def _characters(curve: Curve) -> list[str]:
    """A curve in Braille characters, 2 x 4 dots each, with its range beside it."""
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = 2 * _WIDE - 1, 4 * _HIGH - 1
    cells = [[0] * _WIDE for _ in range(_HIGH)]
    for column in range(2 * _WIDE):
        x = left + (right - left) * column / wide
        row = round((high - _at(curve.points, x)) / ((high - low) or 1.0) * tall)
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    rows = ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
    labels = [f"{high:.5f}", *[""] * (_HIGH - 2), f"{low:.5f}"]
    axis = f"{left:,.0f}".ljust(_WIDE - len(f"{right:,.0f}")) + f"{right:,.0f}"
    return [*(f"{label:>9} {row}" for label, row in zip(labels, rows, strict=True)), f"{'step':>9} {axis}"]


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at a step, on the straight line between its neighbours."""
    after = next((index for index, (step, _) in enumerate(points) if step >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(after - 1, 0)], points[after]
    return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


# ---------------------------------------------------------------------------------------------------------------- page


def _write(output: Path, entries: dict[str, list[dict[str, Any]]], charts: dict[str, list[Curve]]) -> None:
    pictures = [(_TITLES[key], _svg(curves)) for key, curves in charts.items() if curves]
    if output.suffix.lower() == ".svg":
        size = f'viewBox="0 0 760 {260 * len(pictures)}" font-family="sans-serif" font-size="11"'
        parts = "".join(
            f'<g transform="translate(0 {260 * index})"><text x="60" y="14" font-weight="bold">{escape(title)}</text>'
            f'<g transform="translate(0 20)">{inner}</g></g>'
            for index, (title, inner) in enumerate(pictures)
        )
        _html.write(output, f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{parts}</svg>\n')
        return
    rows = [_summary(name, lines) for name, lines in entries.items()]
    parts_: list[_html.Html] = [
        _html.heading("Training", 1),
        _html.table(["run", "method", "steps>", "loss at first>", "loss now>"], rows),
    ]
    for title, inner in pictures:
        style = 'style="height:auto;background:none;font:11px system-ui,sans-serif"'
        parts_ += [_html.heading(title), _html.Html(f'<svg viewBox="0 0 760 240" {style}>{inner}</svg>')]
    for name, lines in entries.items():
        settings = lines[0].get("settings", {})
        if isinstance(settings, dict):
            told = [f"{key} = {value}" for key, value in settings.items()]
            parts_.append(_html.folded(f"Settings of {name}", told))
    _html.write(output, _html.page("Training", parts_))


def _svg(curves: Sequence[Curve]) -> str:
    """Lines in a box of 760 x 240 with a grid and a legend."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    spread = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 680 * (x - left) / ((right - left) or 1.0), 200 - 180 * (y - low) / spread

    grid = ""
    for part in range(5):
        value = low + spread * part / 4
        height = place(left, value)[1]
        grid += f'<path d="M60 {height:.1f}H740" stroke="#8884" fill="none"/>'
        grid += f'<text x="55" y="{height + 4:.1f}" text-anchor="end" fill="#888">{value:.4g}</text>'
        step = left + (right - left) * part / 4
        grid += f'<text x="{place(step, low)[0]:.1f}" y="216" text-anchor="middle" fill="#888">{step:,.0f}</text>'
    lines = ""
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        shown = curve.points[:: 1 + len(curve.points) // _POINTS]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in shown))
        lines += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        lines += f'<text x="{64 + 170 * index}" y="234" fill="{colour}">{escape(curve.name[:26])}</text>'
    return grid + lines
