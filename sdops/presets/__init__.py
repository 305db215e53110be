"""SHELF: presets. One TOML file is one recipe for a use case, whose inputs are given by role.

Each file is a recipe (verbs/_recipe_text.py) with
    about         one sentence: what the result is good for
    source        where the formula is from
    inputs        every one with `about`; the user's own models are roles without a file
    parameters    named by what they mean, with `about` and a range
and is planned and built in the tests with small models of the families that `tags` name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

SHELF = Path(__file__).parent


@cache
def names() -> tuple[str, ...]:
    """All presets, sorted; only the folder is read."""
    return tuple(sorted(path.stem for path in SHELF.glob("*.toml")))


def preset_file(name: str) -> Path:
    """Where a preset lies."""
    return SHELF / f"{name}.toml"


def is_preset_file(path: Path) -> bool:
    """Whether a file is one of the presets."""
    return path.parent == SHELF
