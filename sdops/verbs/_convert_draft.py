"""A conversion in the making: every tensor of the output, how it comes about, and what became of the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdops.archs.detect import MARKER, OTHER, Detection
from sdops.archs.junk import ema_key_of, is_marker, junk_kind
from sdops.archs.tables import FLAT
from sdops.core.assembled import Made, rows
from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.errors import MismatchError, UsageError
from sdops.text import count
from sdops.verbs._convert_extra import Extra, restored
from sdops.verbs._convert_layout import lay_out
from sdops.verbs._convert_select import Chosen, Selection
from sdops.verbs._convert_wish import Wish

if TYPE_CHECKING:
    from sdops.pipelines.tables import Component

WITH_PREFIX = ("unet", "controlnet")  # files with nothing else have the prefix, too
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the output.

    Attributes:
        made: How it comes about.
        component: Whose it is; of others what they are (marker, ema, schedule ... other).
        name: Its name without prefix.
    """

    made: Made
    component: str
    name: str


@dataclass(slots=True)
class Draft:
    """The output.

    Attributes:
        tensors: Name in the output -> Entry; in a folder `unet/NAME`.
        aside: The side file's tensors, by their names in the single file.
        dropped: Tensor of the input -> why it is left out.
        invented: Tensor of the output that no input has -> what it is.
        returned: Tensors that come back from a side file.
        unknown: Tensors that nobody knows what to do with.
        header: The whole header of a safetensors file that is made again, or nothing.
        metadata: Of the output.
        files: Small files of a folder.
        stems: Folder of a component, with a slash -> name of its weights' file; "" for one that is alone.
        places: Component -> its layout and prefix in the single file that a folder is made of.
        taken: Components that come from other files -> their names.
        notes: What the user should know.
    """

    tensors: dict[str, Entry] = field(default_factory=dict)
    aside: dict[str, Entry] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    invented: dict[str, str] = field(default_factory=dict)
    returned: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    header: bytes = b""
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    stems: dict[str, str] = field(default_factory=dict)
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, entry: Entry) -> None:
        """Add a tensor.

        Raises:
            MismatchError: the name is taken.
        """
        if name in self.tensors:
            raise MismatchError(
                f"two tensors would be called `{name}`", hint="`--components` chooses what is converted", key=name
            )
        self.tensors[name] = entry

    def check_unknown(self, name: str) -> None:
        """Refuse to lose what nobody knows.

        Raises:
            MismatchError: naming the first ones.
        """
        if not self.unknown:
            return
        shown = ", ".join(f"`{key}`" for key in self.unknown[:SHOWN])
        raise MismatchError(
            f"`{name}` has {count(len(self.unknown), 'tensor')} that sdops does not know: {shown}"
            + (" ..." if len(self.unknown) > SHOWN else ""),
            hint="`--keep-unknown` keeps them as they are (in a folder: in the side file), `--drop-unknown` leaves "
            "them out",
            keys=self.unknown,
        )


def single_file(
    source: Source, detection: Detection, selection: Selection, wish: Wish, extra: Extra | None, *, relay: bool
) -> Draft:
    """Lay out a single file.

    Args:
        source: The model.
        detection: What it is.
        selection: What is converted.
        wish: The request.
        extra: The side file of a folder.
        relay: Bring components into the layout of original files; else each stays in its own.
    """
    draft = Draft(dropped=dict(selection.dropped), taken=selection.taken, notes=list(selection.notes))
    for chosen in selection.parts:
        layout, prefix = _place(chosen, detection, extra) if relay else own_place(chosen.name, detection, selection)
        alone = len(selection.parts) == 1 and not draft.tensors
        bare = wish.prefix is False or (relay and alone and wish.prefix is None and not _has_prefix(chosen, extra))
        if bare and wish.to != "diffusers":
            prefix = ""
        _add_component(draft, chosen, layout, prefix, wish, extra)
    for key, kind in selection.others.items():
        if kind == OTHER and wish.unknown == "drop":
            draft.dropped[key] = "unknown"
        else:
            draft.add(key, Entry(rows(selection.elsewhere.get(key, source), key), kind, key))
    unknown = [key for key, kind in selection.others.items() if kind == OTHER and key in draft.tensors]
    if unknown:
        kept = "stays as it is" if len(unknown) == 1 else "stay as they are"
        draft.notes.append(f"{count(len(unknown), 'tensor')} that sdops does not know {kept}: `{unknown[0]}`")
    if extra is not None:
        _return_extra(draft, extra, selection, wish)
        if wish.ema == "use":
            _use_average(draft, extra)
    draft.check_unknown(source.name)
    return draft


def restore_header(draft: Draft, extra: Extra) -> None:
    """Give the file the header that it had, if its tensors are what they were."""
    specs = {key: entry.made.spec for key, entry in draft.tensors.items()}
    found = restored(extra.header, specs) if extra.header else None
    if found is None:
        return
    draft.header = extra.header
    draft.tensors = {key: _reshaped(draft.tensors[key], spec) for key, spec in found.items()}


def _reshaped(entry: Entry, spec: Spec) -> Entry:
    return Entry(entry.made.shaped(spec.shape), entry.component, entry.name)


def component_table(name: str, family: str) -> Component | None:
    """What pipelines knows of a component: in the folder of its family, or by itself."""
    from sdops.pipelines.tables import pipeline

    for place in (family, "text_encoder", "vae"):
        found = pipeline(place)
        if found and name in found.components:
            return found.components[name]
    return None


def vae_scale(family: str) -> float | None:
    """The factor between a VAE's latents and what the family's model sees, which tells VAEs of one shape apart."""
    from sdops.pipelines.tables import pipeline

    found = pipeline(family)
    return found.components["vae"].config.get("scaling_factor") if found and "vae" in found.components else None


def own_place(name: str, detection: Detection, selection: Selection) -> tuple[str, str]:
    """Layout and prefix of a component in the model's own file; of one that it lacks, as such files have it.

    A model that was alone is spelled as in whole files, with their prefix, when others are put beside it.
    """
    own = next((part for part in detection.components if part.name == name), None)
    if own is not None and (own.prefix or not selection.added):
        return own.layout, own.prefix
    table = component_table(name, detection.family)
    if table is not None:
        return table.layout, table.prefix
    if own is None:
        raise no_folder(name, [name], ())
    return own.layout, own.prefix


def _place(chosen: Chosen, detection: Detection, extra: Extra | None) -> tuple[str, str]:
    """Layout and prefix of a component in a single file of the original layout."""
    own = chosen.part
    if extra is not None and chosen.name in extra.components:
        return extra.components[chosen.name]["layout"], extra.components[chosen.name]["prefix"]
    table = component_table(chosen.name, detection.family)
    if table is None:
        prefix = f"{chosen.name}." if own.prefix.endswith("/") else own.prefix
        return own.layout.removesuffix(FLAT), prefix
    return table.layout, table.prefix


def _has_prefix(chosen: Chosen, extra: Extra | None) -> bool:
    """Whether a component that is alone keeps its prefix."""
    return chosen.name in WITH_PREFIX or (extra is not None and chosen.name in extra.components)


def _add_component(draft: Draft, chosen: Chosen, layout: str, prefix: str, wish: Wish, extra: Extra | None) -> None:
    invented = set(extra.invented) if extra else set()
    laid = lay_out(chosen, layout)
    for name, made in laid.tensors.items():
        key = made.ranges[0].key
        if key in invented and is_identity(made):
            draft.dropped[key] = "was invented for the folder"
            continue
        draft.add(prefix + name, Entry(made, chosen.name, name))
    unknown = set(laid.unknown)
    for name in laid.left:
        key = chosen.read[name]
        if name not in unknown:
            draft.dropped[key] = f"has no place in the {layout} layout"
        elif wish.unknown == "keep":
            draft.add(prefix + name, Entry(rows(chosen.source, key), chosen.name, name))
        elif wish.unknown == "drop":
            draft.dropped[key] = "unknown"
        else:
            draft.unknown.append(key)


def _use_average(draft: Draft, extra: Extra) -> None:
    """Put the moving average in a side file in the place of the U-Net."""
    for name, entry in draft.tensors.items():
        average_name = ema_key_of(name)
        if entry.component == "unet" and (average := extra.tensors.get(average_name)):
            draft.dropped |= dict.fromkeys((each.key for each in entry.made.ranges), "replaced by its moving average")
            draft.dropped.pop(average_name, None)
            draft.tensors[name] = Entry(rows(extra.source, average), entry.component, entry.name)


def _return_extra(draft: Draft, extra: Extra, selection: Selection, wish: Wish) -> None:
    """Put back what the folder could not hold."""
    prefixes = {name: place["prefix"] for name, place in extra.components.items()}
    chosen = {each.name for each in selection.parts}
    for name, key in extra.tensors.items():
        kind = MARKER if is_marker(name) else junk_kind(name)
        owner = next((part for part, prefix in prefixes.items() if prefix and name.startswith(prefix)), "")
        if kind == "ema" and (wish.ema != "keep" or wish.prune):
            draft.dropped[name] = "moving average"
        elif kind not in (None, MARKER) and wish.prune:
            draft.dropped[name] = f"pruned: {kind}"
        elif owner and owner not in chosen:
            draft.dropped[name] = f"the {owner} was not asked for"
        elif not owner and kind is None and wish.components:
            draft.dropped[name] = "belongs to no component that was asked for"
        else:
            draft.tensors[name] = Entry(rows(extra.source, key), owner or kind or OTHER, name)
            draft.returned.append(name)


ONE = {"F64": b"\0\0\0\0\0\0\xf0?", "F32": b"\0\0\x80?", "F16": b"\0<", "BF16": b"\x80?"}


def identity(width: int, dtype: str) -> tuple[Spec, bytes]:
    """The matrix that changes nothing."""
    one = ONE[dtype]
    row = one + bytes(len(one) * width)
    return Spec(dtype, (width, width)), (row * width)[: width * width * len(one)]


def is_identity(made: Made) -> bool:
    """Whether a square matrix is the identity."""
    spec, part = made.spec, made.ranges[0]
    if len(spec.shape) != 2 or spec.shape[0] != spec.shape[1] or spec.dtype not in ONE:
        return False
    data = bytearray(spec.nbytes)
    part.source.read_into(part.key, part.start, memoryview(data))
    return bytes(data) == identity(spec.shape[0], spec.dtype)[1]


def stale_hashes(metadata: Mapping[str, str]) -> list[str]:
    """Keys of hashes that are no longer true when the tensors lie elsewhere."""
    return [key for key in metadata if key in ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")]


def no_folder(name: str, parts: Collection[str], others: Collection[str]) -> UsageError:
    """The error for what diffusers has no classes for, beside other components."""
    return UsageError(
        f"`{name}` cannot become a folder of diffusers: sdops knows no class for {', '.join(parts)}",
        hint=f"`--components {','.join(others)}` converts the others"
        if others
        else "`--to safetensors` keeps it a single file; `sdops inspect` shows what it is",
    )
