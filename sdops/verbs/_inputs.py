"""Open the models of a merge and make them comparable: no fp8, the same prefixes, first convolutions of one width."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdops.archs.detect import Component, Detection, detect
from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.errors import FormatError, MismatchError
from sdops.formats import FileSource, open_source

Model = str | os.PathLike[str] | Source

# The shapes of these may differ between a model and its inpainting, edit or depth variant, in dim 1 alone.
FIRST_CONVOLUTIONS = ("input_blocks.0.0.weight", "conv_in.weight")


@dataclass(slots=True)
class Opened:
    """One model of a merge.

    Attributes:
        source: Its tensors, as the merge sees them.
        detection: What it is.
        files: Files on disk that hold it; empty for a Source made in memory.
        dequantised: How many fp8 tensors are presented as float32.
        origin: The Source of the files, without views.
        notes: What the user should know about how it is merged.
    """

    source: Source
    detection: Detection
    files: list[Path]
    dequantised: int = 0
    origin: FileSource | None = None
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file of the model is not what it was when it was opened."""
        if self.origin is not None:
            self.origin.check_unchanged()

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.source.name


def open_model(model: Model) -> Opened:
    """Open a path, or take a Source as it is.

    Raises:
        SdopsError: it cannot be read.
        FormatError: its weights are quantised in a way that cannot be merged.
    """
    origin: FileSource | None = None
    if isinstance(model, str | os.PathLike):
        source: Source = (origin := open_source(model))
    else:
        source = model
    detection = detect(source.specs)
    quantised = sum(spec.dtype in FP8 for spec in source.specs.values())
    if quantised:
        from sdops.core.views import Dequantised

        source = Dequantised(source)
    _refuse_other_quantisation(source)
    return Opened(source, detection, list(origin.files) if origin else [], quantised, origin)


def same_names(model: Opened, first: Opened) -> Opened:
    """Give a model's tensors the prefixes that the first model has for the same components.

    Raises:
        MismatchError: the two are of different families or layouts.
    """
    own, wanted = _by_name(model.detection), _by_name(first.detection)
    shared = own.keys() & wanted.keys()
    if not shared and _overlap(model, first) == 0:
        raise _unlike(model, first)
    for name in shared:
        if own[name].layout != wanted[name].layout and _overlap(model, first) == 0:
            raise MismatchError(
                f"`{model.name}` is in the {own[name].layout} layout, "
                f"`{first.name}` in the {wanted[name].layout} layout",
                hint=f"`sdops inspect {first.name} {model.name}` shows both; bring them into one layout first",
            )
    moved = {own[n].prefix: wanted[n].prefix for n in shared if own[n].prefix != wanted[n].prefix}
    if not moved:
        return model
    from sdops.core.views import Renamed

    names = {_moved(key, moved, model.detection, own): key for key in model.source.specs}
    return replace(model, source=Renamed(model.source, names))


def alike(model: Opened, first: Opened) -> Opened:
    """A model as it can be merged with the first: names by `same_names`, first convolutions of one width."""
    return _same_channels(same_names(model, first), first)


def _same_channels(model: Opened, first: Opened) -> Opened:
    """Give a first convolution as many input channels as the first model's has."""
    for key, spec in first.source.specs.items():
        other = model.source.specs.get(key)
        if other is None or other.shape == spec.shape or not key.endswith(FIRST_CONVOLUTIONS):
            continue
        if len(spec.shape) == 4 and other.shape[:1] + other.shape[2:] == spec.shape[:1] + spec.shape[2:]:
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


def _by_name(detection: Detection) -> dict[str, Component]:
    return {component.name: component for component in detection.components}


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


def _moved(key: str, moved: dict[str, str], detection: Detection, own: dict[str, Component]) -> str:
    """A key under the prefix that its component has in the first model."""
    from sdops.archs.detect import component_of

    component = own.get(component_of(detection, key))
    if component is None or component.prefix not in moved:
        return key
    return moved[component.prefix] + key.removeprefix(component.prefix)


def _refuse_other_quantisation(source: Source) -> None:
    """Weights in 4 bits or in integers with scales cannot be averaged."""
    for key, spec in source.specs.items():
        if (
            ".quant_state." in key
            or key.endswith((".qweight", ".wscales"))
            or spec.dtype in ("F4", "F6_E2M3", "F6_E3M2")
        ):
            raise FormatError(
                f"`{source.name}` is quantised (`{key}`): its numbers are codes, not weights",
                hint="merge the unquantised model; `sdops inspect` shows what a file holds",
                key=key,
            )
