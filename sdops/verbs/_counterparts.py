"""Which tensor of one model is which of another: through prefixes, spellings and layouts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdops.archs.detect import Component, Detection, component_of, detect
from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.core.views import Dequantised, Renamed
from sdops.formats import FileSource, open_source
from sdops.verbs._inputs import FLAT


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
    detection = detect(origin.specs)
    scaled = any(origin.specs[key].dtype in FP8 for key in detection.quantised)
    return Model(origin, Dequantised(origin) if scaled else origin, detection)


@dataclass(frozen=True, slots=True)
class Counterparts:
    """A model seen through the names of another.

    Attributes:
        source: Its tensors, under the other's names where the other has them.
        keys: Name there -> name in the model's own file.
        notes: Component -> how its spelling differs (`prefix`, `layout`).
    """

    source: Source
    keys: Mapping[str, str]
    notes: Mapping[str, str]


def counterparts(model: Model, first: Model) -> Counterparts:
    """Give the tensors of `model` the names that `first` has for the same components."""
    own, wanted = _components(model), _components(first)
    notes: dict[str, str] = {}
    for name in own.keys() & wanted.keys():
        if _plain(own[name]) != _plain(wanted[name]):
            notes[name] = f"{own[name].layout} layout"
        elif (own[name].prefix, own[name].layout) != (wanted[name].prefix, wanted[name].layout):
            notes[name] = f"prefix `{own[name].prefix}`"
    keys = {}
    for key in model.source.specs:
        name = component_of(model.detection, key)
        keys[_moved(key, own[name], wanted[name], first) if name in notes else key] = key
    if all(new == old for new, old in keys.items()):
        return Counterparts(model.source, keys, notes)
    return Counterparts(Renamed(model.source, keys), keys, notes)


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
