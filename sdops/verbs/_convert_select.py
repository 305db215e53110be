"""Which tensors of a model are converted: components, moving averages, ballast, and components from other files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sdops.archs.detect import MARKER, OTHER, Component, Detection, component_of
from sdops.archs.junk import ema_key_of, is_prediction
from sdops.core.source import Source
from sdops.errors import MismatchError, UsageError
from sdops.text import count, suggest

EMA = ("keep", "drop", "use")
_KINDS = {"text_encoder": "text_encoder", "text_encoders": "text_encoder", "clip": "text_encoder", "model": "model"}
_DENOISERS = ("unet", "transformer", "model")
SCALED = "scaled_fp8"  # stands behind the prefix of a component whose fp8 weights have scales


@dataclass(frozen=True, slots=True)
class Chosen:
    """A component that goes into the output.

    Attributes:
        part: What archs says of it; of a component from another file, what it says there.
        source: Where its tensors are.
        read: Name without prefix -> tensor of the source.
    """

    part: Component
    source: Source
    read: Mapping[str, str]

    @property
    def name(self) -> str:
        """As in archs."""
        return self.part.name


@dataclass(slots=True)
class Selection:
    """What is converted.

    Attributes:
        parts: The components.
        others: Tensors of no component that stay -> what they are: marker, ema, schedule ..., "other" if unknown.
        dropped: Tensor -> why it is left out.
        notes: What the user should know.
        taken: Components that come from other files -> their names.
        added: Whether the model had none of some of these.
        elsewhere: Those of `others` that come from another file -> that file.
        teller: The file that the denoiser comes from, and what it is, if it is another: it tells what is predicted.
    """

    parts: list[Chosen] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)
    added: bool = False
    elsewhere: dict[str, Source] = field(default_factory=dict)
    teller: tuple[Source, Detection] | None = None


def select(
    source: Source, detection: Detection, *, components: Sequence[str] = (), ema: str = "keep", prune: bool = False
) -> Selection:
    """Choose the tensors.

    Args:
        source: The model.
        detection: What it is.
        components: Names of components (`unet`, `vae`, `clip_l`, `text_encoder` for all of them); none: everything.
        ema: keep | drop | use: what happens to the moving average; `use` puts it in the place of the U-Net.
        prune: Leave out whatever no program needs: the average, noise schedules, left-overs of training.

    Raises:
        UsageError: there is no such component.
        MismatchError: there is no moving average to use.
    """
    chosen = _named(detection, components)
    found = Selection()
    for part in detection.components:
        if part in chosen:
            read = {key.removeprefix(part.prefix): key for key in part.keys}
            found.parts.append(Chosen(part, source, read))
        else:
            found.dropped |= dict.fromkeys(part.keys, f"the {part.name} was not asked for")
    with_model = not components or any(part.kind in ("model", "control") for part in chosen)
    owned = {key for part in detection.components for key in part.keys}
    for key in source.specs:
        if key in owned:
            continue
        kind = component_of(detection, key)
        if not with_model:
            found.dropped[key] = "belongs to no component that was asked for"
        elif kind == "ema" and (ema != "keep" or prune):
            found.dropped[key] = "moving average" + (", used in place of the plain weights" if ema == "use" else "")
        elif prune and kind not in (MARKER, OTHER):
            found.dropped[key] = f"pruned: {kind}"
        else:
            found.others[key] = kind
    if ema == "use":
        _use_ema(found, source)
    return found


def take(selection: Selection, donor: Source, detection: Detection, kind: str, wanted: Collection[str]) -> None:
    """Take the components of a kind from another file; its spelling does not matter.

    Args:
        selection: Changed in place.
        donor: The other file.
        detection: What it is.
        kind: "model", "vae" or "text_encoder"; of text encoders those are taken that the model has, or is to have.
        wanted: Names of the components that a whole model has: those that this one lacks are added.

    Raises:
        MismatchError: the other file has none that the model has or is to have.
    """
    offered = {part.name: part for part in detection.components if part.kind == kind}
    places = {each.name: index for index, each in enumerate(selection.parts)}
    taken = [part for name, part in offered.items() if name in places or name in wanted]
    if not taken:
        words = "denoiser" if kind == "model" else kind.replace("_", " ")
        raise MismatchError(
            f"`{donor.name}` has no {words} that has a place in the model",
            hint=f"`sdops inspect {donor.name}` shows its components",
        )
    for part in taken:
        keys = [*part.keys, *(key for key in (f"{part.prefix}{SCALED}",) if key in donor.specs)]
        chosen = Chosen(part, donor, {key.removeprefix(part.prefix): key for key in keys})
        selection.taken[part.name] = donor.name
        if part.name in places:
            old = selection.parts[places[part.name]]
            _check_family(old, part, donor.name)
            mark = [key for key in (f"{old.part.prefix}{SCALED}",) if selection.others.pop(key, None)]
            selection.dropped |= dict.fromkeys([*old.read.values(), *mark], f"replaced from `{donor.name}`")
            selection.parts[places[part.name]] = chosen
        else:
            selection.parts.append(chosen)
            selection.added = True
    if kind == "model":
        _follow(selection, donor, detection)


def _check_family(old: Chosen, part: Component, donor: str) -> None:
    if part.kind == "model" and part.family != old.part.family:
        raise MismatchError(
            f"the {part.name} of `{donor}` is {part.title}, the model's own is {old.part.title}",
            hint=f"`sdops inspect {donor}` shows what it is for",
        )


def _follow(selection: Selection, donor: Source, detection: Detection) -> None:
    """With another denoiser its average goes, and it is the other file that tells what is predicted."""
    for key, kind in list(selection.others.items()):
        if kind == "ema" or is_prediction(key):
            del selection.others[key]
            selection.dropped[key] = f"belongs to what `{donor.name}` replaces"
    told = {key: MARKER for key in donor.specs if is_prediction(key)}
    selection.others |= told
    selection.elsewhere |= dict.fromkeys(told, donor)
    selection.teller = donor, detection


def _named(detection: Detection, names: Sequence[str]) -> list[Component]:
    """The components that were asked for."""
    if not names:
        return list(detection.components)
    found: list[Component] = []
    for name in names:
        matches = [
            part
            for part in detection.components
            if part.name == name or part.kind == _KINDS.get(name) or (name in _DENOISERS and part.kind == "model")
        ]
        if not matches:
            known = [part.name for part in detection.components]
            close = suggest(name, known)
            raise UsageError(
                f"there is no component `{name}`" + (f"; did you mean `{close}`?" if close else ""),
                hint=f"the file has {', '.join(known) or 'none that is known'}",
            )
        found += [part for part in matches if part not in found]
    return found


def _use_ema(selection: Selection, source: Source) -> None:
    """Read the average wherever there is one."""
    replaced = 0
    for index, chosen in enumerate(selection.parts):
        if chosen.part.kind != "model":
            continue
        averages = {name: ema_key_of(f"model.diffusion_model.{name}") for name in chosen.read}
        there = {name: key for name, key in averages.items() if key in source.specs}
        replaced += len(there)
        missing = len(chosen.read) - len(there)
        if there and missing:
            selection.notes.append(f"{count(missing, 'tensor')} of the {chosen.name} have no average and stay")
        for name in there:
            selection.dropped[chosen.read[name]] = "replaced by its moving average"
            selection.dropped.pop(there[name], None)
        selection.parts[index] = replace(chosen, read={**chosen.read, **there})
    if not replaced:
        raise MismatchError(
            f"`{source.name}` has no moving average to use", hint="leave `--ema use` away; `sdops inspect` shows it"
        )
