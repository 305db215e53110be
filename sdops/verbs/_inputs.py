"""Open the models of a merge and make them comparable: no fp8, one layout, equal names, first layers of one width."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sdops.archs.detect import Component, Detection, component_of, detect
from sdops.archs.tables import FLAT
from sdops.core.source import Source
from sdops.errors import FormatError, MismatchError
from sdops.formats import open_source

Model = str | os.PathLike[str] | Source

# The shapes of these may differ between a model and its inpainting, edit or depth variant, in dim 1 alone.
FIRST_LAYERS = ("input_blocks.0.0.weight", "conv_in.weight", "img_in.weight")


@runtime_checkable
class Unwritten(Protocol):
    """A merge that serves as the input of another one.

    Attributes:
        parts: Its own inputs by role.
        made: Its recipe.
    """

    parts: Mapping[str, Opened]
    made: Mapping[str, Any]


@dataclass(slots=True)
class Opened:
    """One model of a merge.

    Attributes:
        source: Its tensors, as the merge sees them.
        origin: The same without views.
        detection: What it is.
        notes: What the user should know about how it is merged.
        layouts: Component -> (layout in the file, layout it is seen in), where they differ.
        placeless: Tensors of either side that the other one's layout has no place for -> why.
    """

    source: Source
    origin: Source
    detection: Detection
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    placeless: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.origin.name

    @property
    def files(self) -> list[Path]:
        """Files on disk that hold it; none for a Source made in memory."""
        return list(getattr(self.origin, "files", ()))

    def warnings(self) -> list[str]:
        """What its format found to be unusual, each sentence with the model's name."""
        found = [(leaf.name, text) for leaf in self.leaves() for text in getattr(leaf.origin, "warnings", ())]
        return [text if f"`{name}`" in text else f"`{name}`: {text}" for name, text in found]

    def leaves(self) -> list[Opened]:
        """The model itself, or the inputs of a merge that has not been written, theirs included."""
        if not isinstance(self.origin, Unwritten):
            return [self]
        return [leaf for part in self.origin.parts.values() for leaf in part.leaves()]

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file of the model is not what it was when it was opened."""
        for leaf in self.leaves():
            if check := getattr(leaf.origin, "check_unchanged", None):
                check()


def open_model(model: Model) -> Opened:
    """Open a path, or take a Source as it is.

    Raises:
        SdopsError: it cannot be read.
        FormatError: it is an adapter, or its weights are quantised in a way that cannot be merged, or read.
    """
    origin: Source = open_source(model) if isinstance(model, str | os.PathLike) else model
    if check := getattr(origin, "check_readable", None):
        check()
    detection = detect(origin.specs)
    if detection.family == "adapter":  # a weighted sum of factors is not the factors of a weighted sum
        raise FormatError(
            f"`{origin.name}` is an adapter (LoRA or the like): its factors cannot be merged tensor by tensor",
            hint="merge checkpoints; `sdops inspect` shows what a file holds",
        )
    packed = {weight: how.kind for weight, how in detection.quantised.items()}
    for weight, kind in packed.items():
        if kind not in ("fp8", "fp8-scaled"):
            raise FormatError(
                f"`{origin.name}` is quantised ({kind}, `{weight}`): its numbers are codes, not weights",
                hint="merge the unquantised model; `sdops inspect` shows what a file holds",
                key=weight,
            )
    if not packed:
        return Opened(origin, origin, detection)
    from sdops.core.views import Dequantised

    return Opened(Dequantised(origin), origin, detection)


def input_of(source: Source) -> Opened:
    """What is open already, as an input of a run: hashed, and watched for changes."""
    return Opened(source, source, detect(source.specs))


def same_names(model: Opened, first: Opened, kind: str = "") -> Opened:
    """Give a model's tensors the names, and where it needs that the layouts, that the first model has.

    Args:
        model: Any model.
        first: Whose names count.
        kind: Look at components of this kind only, also at those that the first model could have; empty = at all.

    Raises:
        MismatchError: the two have nothing in common, or there is no way between their layouts.
    """
    own, wanted = _by_name(model.detection, kind), _by_name(first.detection, kind)
    places = places_beside(first) if kind else {}
    for name in (own.keys() & places.keys()) - wanted.keys():
        layout, prefix = places[name]
        wanted[name] = replace(own[name], layout=layout, prefix=prefix, expected=None, keys=(), missing=(), extra=())
    shared = own.keys() & wanted.keys()
    if not shared and not kind and _overlap(model, first) == 0:
        raise _unlike(model, first)
    if all((own[n].prefix, own[n].layout) == (wanted[n].prefix, wanted[n].layout) for n in shared):
        return model
    foreign = [name for name in own if name in shared and _is_foreign(own[name], wanted[name])]
    moving = shared.difference(foreign)
    names = {}
    for key in model.source.specs:
        name = component_of(model.detection, key)
        if name not in foreign:
            names[_moved(key, own[name], wanted[name], first) if name in moving else key] = key
    if foreign:
        return _relaid(model, first, [(own[name], wanted[name]) for name in foreign], names)
    from sdops.core.views import Renamed

    source = Renamed(model.source, names)
    return replace(model, source=source, detection=detect(source.specs))


def _relaid(
    model: Opened, first: Opened, foreign: Sequence[tuple[Component, Component]], names: Mapping[str, str]
) -> Opened:
    """A model with some components (its own, the first model's) in the first model's layout, the others renamed."""
    from sdops.core.assembled import Assembled, rows
    from sdops.verbs._relaid import Relaid

    found = Relaid({new: rows(model.source, key) for new, key in names.items()})
    for own, wanted in foreign:
        try:
            found.add(model.source, own, wanted, (model.name, first.name))
        except MismatchError as error:
            raise MismatchError(
                f"the {own.name} of `{model.name}` is in the {own.layout} layout, "
                f"that of `{first.name}` in the {wanted.layout} layout: {error.message}",
                hint=f"`sdops inspect {first.name} {model.name}` shows both",
            ) from error
    source = Assembled(model.source.name, found.tensors, model.source.metadata)
    return replace(
        model,
        source=source,
        detection=detect(source.specs),
        notes=(*model.notes, *found.notes),
        layouts=found.layouts,
        placeless=found.placeless,
    )


def alike(model: Opened, first: Opened) -> Opened:
    """A model as it can be merged with the first: names by `same_names`, first layers of one width."""
    return _same_channels(same_names(model, first), first)


def _same_channels(model: Opened, first: Opened) -> Opened:
    """Give a first layer as many input channels as the first model's has."""
    for key, spec in first.source.specs.items():
        other = model.source.specs.get(key)
        if other is None or other.shape == spec.shape or not key.endswith(FIRST_LAYERS):
            continue
        if len(spec.shape) > 1 and other.shape[:1] + other.shape[2:] == spec.shape[:1] + spec.shape[2:]:
            from sdops.core.views import WithChannels

            note = f"`{key}` has {other.shape[1]} input channels in `{model.name}`, {spec.shape[1]} in `{first.name}`: "
            note += "only those in common are merged"
            model = replace(model, source=WithChannels(model.source, key, first.source), notes=(*model.notes, note))
    return model


def check_families(first: Opened, others: Sequence[Opened]) -> None:
    """Refuse models of different families that share too little to be merged.

    Raises:
        MismatchError: names both and says how many tensors they share.
    """
    for model in others:
        families = {first.detection.family, model.detection.family}
        if len(families) > 1 and _overlap(model, first) < 0.5:
            raise _unlike(model, first)


def places_beside(first: Opened) -> dict[str, tuple[str, str]]:
    """Component -> its layout and prefix in single files of a family, if the model is one of these."""
    from sdops.pipelines.tables import pipeline

    main, found = first.detection.main, pipeline(first.detection.family, first.detection.variants)
    if main is None or found is None or main.name not in found.components:
        return {}
    places = {name: (part.layout, part.prefix) for name, part in found.components.items()}
    return places if places[main.name] == (main.layout, main.prefix) else {}


def _is_foreign(own: Component, wanted: Component) -> bool:
    """Whether names have to be looked up: other layouts, but for names that have `text_model.` or have it not."""
    if own.table is wanted.table:  # one that the first model lacks
        return own.layout != wanted.layout
    return own.layout.removesuffix(FLAT) != wanted.layout.removesuffix(FLAT)


def _by_name(detection: Detection, kind: str) -> dict[str, Component]:
    return {part.name: part for part in detection.components if kind in ("", part.kind)}


def _overlap(model: Opened, first: Opened) -> float:
    """Share of the first model's floating tensors that the other has in the same shape."""
    floats = [k for k, s in first.source.specs.items() if s.is_float]
    specs = model.source.specs
    return sum(k in specs and specs[k].shape == first.source.specs[k].shape for k in floats) / max(len(floats), 1)


def _unlike(model: Opened, first: Opened) -> MismatchError:
    total = len(first.source.specs)
    shared = sum(
        k in model.source.specs and model.source.specs[k].shape == s.shape for k, s in first.source.specs.items()
    )
    return MismatchError(
        f"`{model.name}` is {model.detection.title}, `{first.name}` is {first.detection.title}; "
        f"they share {shared:,} of {total:,} tensors",
        hint=f"`sdops inspect {first.name} {model.name}` shows both",
        shared=shared,
        total=total,
    )


def _moved(key: str, own: Component, wanted: Component, first: Opened) -> str:
    """A key as the first model's component spells it: its prefix, with or without the part that flat names lack."""
    name = key.removeprefix(own.prefix)
    full = wanted.prefix + own.table.strip + name
    if own.table.strip and not wanted.table.strip and full in first.source.specs:
        return full
    return wanted.prefix + (name if own.table.strip else name.removeprefix(wanted.table.strip))
