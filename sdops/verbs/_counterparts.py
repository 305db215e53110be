"""Which tensor of one model is which of another: through prefixes, spellings and layouts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdops.archs.detect import Component, Detection, detect
from sdops.archs.tables import FLAT
from sdops.core.assembled import Assembled, Made, joined, rows
from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.core.views import Dequantised
from sdops.errors import MismatchError
from sdops.formats import FileSource, open_source
from sdops.layouts.tables import made_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is looked at.

    Attributes:
        origin: The file.
        source: Its tensors as numbers: fp8 weights times their scales.
        detection: What it is.
    """

    origin: FileSource
    source: Source
    detection: Detection

    def is_code(self, key: str) -> bool:
        """Whether the tensor's bytes are no numbers by themselves (4-bit weights and the like)."""
        found = self.detection.quantised.get(key)
        return found is not None and self.origin.specs[key].dtype not in FP8


def open_model(path: Path) -> Model:
    """Open a file of any format.

    Raises:
        SdopsError: it cannot be read.
    """
    origin = open_source(path)
    if check := getattr(origin, "check_readable", None):
        check()
    detection = detect(origin.specs)
    scaled = any(origin.specs[key].dtype in FP8 for key in detection.quantised)
    return Model(origin, Dequantised(origin) if scaled else origin, detection)


@dataclass(frozen=True, slots=True)
class Counterparts:
    """A model seen through the names of another.

    Attributes:
        source: Its tensors, under the other's names where the other has them.
        keys: Name there -> name in the model's own file; of several, the first.
        notes: Component -> how its spelling differs (`prefix`, `layout`).
    """

    source: Source
    keys: Mapping[str, str]
    notes: Mapping[str, str]


def counterparts(model: Model, first: Model) -> Counterparts:
    """Give the tensors of `model` the names and the layouts that `first` has for the same components."""
    own, wanted = _components(model), _components(first)
    made = {key: rows(model.source, key) for key in model.source.specs}
    notes: dict[str, str] = {}
    for name in [name for name in own if name in wanted]:
        part, other = own[name], wanted[name]
        if (part.prefix, part.layout) == (other.prefix, other.layout):
            continue
        keys = [key for key in part.keys if key in made]
        if _plain(part) != _plain(other):
            moved, notes[name] = _relaid(part, other, keys, model.source), f"{part.layout} layout"
        else:
            moved = {_moved(key, part, other, first): made[key] for key in keys}
            notes[name] = f"prefix `{part.prefix}`"
        used = {piece.key for each in moved.values() for piece in each.ranges}
        made = {key: each for key, each in made.items() if key not in used} | moved
    keys_of = {key: each.ranges[0].key for key, each in made.items()}
    source = Assembled(model.source.name, made, model.source.metadata) if notes else model.source
    return Counterparts(source, keys_of, notes)


def _relaid(part: Component, wanted: Component, keys: list[str], source: Source) -> dict[str, Made]:
    """A component's tensors in another layout, as far as a way is known and their shapes allow it."""
    names = [key.removeprefix(part.prefix) for key in keys]
    found = {}
    with suppress(MismatchError):
        for name, parts in made_of(part.family, part.name, part.layout, wanted.layout, names).items():
            with suppress(MismatchError):
                pieces = [rows(source, part.prefix + each.key, each.share, each.operation) for each in parts]
                found[wanted.prefix + name] = joined(pieces)
    return found


def _components(model: Model) -> dict[str, Component]:
    return {part.name: part for part in model.detection.components}


def _plain(part: Component) -> str:
    """The layout, whether or not its names have `text_model.`."""
    return part.layout.removesuffix(FLAT)


def _moved(key: str, own: Component, wanted: Component, first: Model) -> str:
    """A key under the other's prefix, with `text_model.` if the other has it."""
    name = key.removeprefix(own.prefix)
    spellings = (own.table.strip + name, name, name.removeprefix(wanted.table.strip))
    candidates = [wanted.prefix + spelling for spelling in spellings]
    return next((new for new in candidates if new in first.source.specs), candidates[0])
