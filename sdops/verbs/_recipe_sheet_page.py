"""The contact sheet of a sweep as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdops.text import count
from sdops.verbs import _html
from sdops.verbs._recipe_sheet import Cell
from sdops.verbs._recipe_text import Recipe, spelled


def write_page(path: Path, recipe: Recipe, found: Sequence[Cell]) -> None:
    """Write the page.

    Args:
        path: Where to.
        recipe: What was built.
        found: All results.

    Raises:
        OutputError: it cannot be written.
    """
    _html.write(path, _html.page(recipe.name, _parts(recipe, found)))


def _parts(recipe: Recipe, found: Sequence[Cell]) -> Iterator[_html.Html]:
    yield _html.heading(recipe.name, 1)
    if recipe.about:
        yield _html.paragraph(recipe.about)
    knobs = list(found[0].settings)
    yield _html.facts([("results", count(len(found), "file")), ("parameters", ", ".join(knobs))])
    inputs = list(found[0].distances)
    yield _html.heading("Distances")
    yield _html.paragraph("||result - input|| / ||input||, Euclidean norms over all tensors that both have.", "dim")
    yield _html.table(
        ["file", *(f"{knob}>" for knob in knobs), "norm>", *(f"from {name}>" for name in inputs)],
        [
            [
                cell.output.name,
                *(spelled(value) for value in cell.settings.values()),
                f"{cell.norm:.6g}",
                *(f"{cell.distances[name]['']:.4g}" for name in inputs),
            ]
            for cell in found
        ],
    )
    for name in inputs:
        yield from _map(name, found)


def _map(name: str, found: Sequence[Cell]) -> Iterator[_html.Html]:
    """Blocks and results, the longer list downwards, in colours from nothing to the largest distance."""
    blocks = [block for block in found[0].distances[name] if block]
    most = max((cell.distances[name][block] for cell in found for block in blocks), default=0.0) or 1.0
    results = [" ".join(spelled(value) for value in cell.settings.values()) for cell in found]
    heats = [[_heat(cell.distances[name][block], most, block) for block in blocks] for cell in found]
    yield _html.heading(f"Distance from {name}, by block and {', '.join(found[0].settings)}")
    if len(results) > len(blocks):
        yield _html.heat_map(blocks, zip(results, heats, strict=True))
    else:
        yield _html.heat_map(results, zip(blocks, map(list, zip(*heats, strict=True)), strict=True))


def _heat(distance: float, most: float, block: str) -> _html.Heat:
    return _html.Heat(distance / most, f"{distance:.2g}", f"{block}: {distance:.4g}")
