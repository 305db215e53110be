"""Which architecture an adapter file is for: told from names, shapes and depth, and from the header where these leave
a choice.

Several families have layers of the same names and sizes: attention of Flux and Qwen-Image in diffusers' names, Flux and
Chroma. A file that fits several equally well is taken for the most widespread one; the others are its `rivals`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdops import adapters
from sdops.archs.detect import Detection
from sdops.archs.tables import tables
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.spec import Spec
from sdops.dialects import CANONICAL, Contents, Dialect, Names, Reading, dialect
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.text import suggest
from sdops.verbs._adapter_names import ARCHITECTURES, Architecture, names_of

_TEXT_NAMES = r"text_model|text_encoder|lora_te|encoder[._]block|model\.(?:encoder\.layers|embeddings)\."
_TEXT_WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280, "t5xxl": 4096, "umt5xxl": 4096}
_FLUX_BEGINS = ("transformer.", "base_model.model.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
# Where a file says what it was trained on, and what the families are called there.
BASES = ("ss_base_model_version", "modelspec.architecture", "base_model_name_or_path")
_SAID = {
    "sd1": ("sd_v1", "sd_1.5", "stable-diffusion-v1", "stable-diffusion-1"),
    "sd2": ("sd_v2", "stable-diffusion-v2", "stable-diffusion-2"),
    "sdxl": ("sdxl", "stable-diffusion-xl"),
    "flux1": ("flux1", "flux-1", "flux.1"),
    "flux2": ("flux2", "flux-2", "flux.2"),
    "sd3": ("sd3", "stable-diffusion-3"),
    "chroma": ("chroma",),
    "qwen_image": ("qwen",),
    "wan": ("wan2", "wan-2", "wan_2", "wan-ai"),
    "z_image": ("z-image", "z_image", "zimage"),
    "lumina2": ("lumina",),
}


@dataclass(frozen=True, slots=True)
class Meant:
    """What a file is taken for.

    Attributes:
        architecture: The family.
        reading: Its patches.
        rivals: Other families that explain it as well.
    """

    architecture: Architecture
    reading: Reading
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a family explains a file; what comes first counts most.

    Attributes:
        understood: Number of names.
        fitting: Minus the number of patches whose sizes contradict.
        sound: Whether no layer is incomplete or there twice.
        deep: Whether its blocks reach from the first to the last one.
        said: Whether the header names the family.
        usual: Whether it is spelled as programs for this family do. No evidence, but a good guess.
    """

    understood: int
    fitting: int
    sound: bool
    deep: bool
    said: bool
    usual: bool

    @property
    def evidence(self) -> tuple[int, ...]:
        """Without what is only a guess."""
        return self.understood, self.fitting, self.sound, self.deep, self.said


def read_as_any(file: Contents, spelling: Dialect, wanted: str | None = None) -> Meant:
    """Read a file as an adapter of the architecture that explains it best.

    Args:
        file: Names, shapes and header.
        spelling: Its dialect.
        wanted: The family, if the user says so.

    Raises:
        FormatError: it explains nothing as any, or is damaged.
        UsageError: there is no family `wanted`.
    """
    found: list[tuple[_Fit, Architecture, Reading]] = []
    error: FormatError | None = None
    for architecture in _candidates(file, wanted):
        if any(_rules_out(file, fit, reading, architecture) for fit, _, reading in found):
            continue  # to know the names of a family takes time and memory
        names = names_of(architecture.family, architecture.variant)
        try:
            reading = spelling.read(file, names)
        except FormatError as failed:
            error = error or failed
            continue
        found.append((_fit(file, architecture, names, reading), architecture, reading))
    if not found:
        raise error or FormatError("no architecture fits", hint="see the names with `sdops inspect FILE`")
    best, architecture, reading = max(found, key=lambda each: (*each[0].evidence, each[0].usual))
    if reading.problem is not None:
        raise reading.problem
    if error is not None and not reading.patches:
        raise error
    equal = [other.family for fit, other, _ in found if fit.evidence == best.evidence and _has_denoiser(reading)]
    return Meant(architecture, reading, tuple(name for name in dict.fromkeys(equal) if name != architecture.family))


def check_family(adapter: Adapter, model: Detection, name: str, problem: str = "") -> None:
    """Refuse an adapter that was made for another family of models.

    Args:
        adapter: The adapter.
        model: What the model is.
        name: The model's name, for the message.
        problem: What does not fit, if that is known.

    Raises:
        MismatchError: names both.
    """
    if model.family == adapter.architecture:
        return
    file, ours, theirs = adapter.source.name, title_of(adapter.architecture), model.title
    hint = f"`sdops inspect {file} {name}` shows both"
    if model.family in adapter.rivals:
        why = (
            f"`{file}` may be for {ours} or {theirs}, nothing in it tells; it is taken for {ours}, `{name}` is {theirs}"
        )
        hint = f"`--architecture {model.family}` if it was made for this kind of model"
    else:
        said = says(adapter.source.metadata)
        why = f"`{file}` is for {ours}{said and f' ({said})'}, `{name}` is {theirs}"
        if _would_fit(adapter, model.family):
            hint += f"; `--architecture {model.family}` applies it nevertheless, because the names of its layers fit"
    raise MismatchError(
        f"{why}{problem and ': '}{problem}", hint=hint, adapter=adapter.architecture, model=model.family
    )


def _would_fit(adapter: Adapter, family: str) -> bool:
    """Whether all names are those of another family as well."""
    file = Contents(adapter.source.specs, adapter.source.metadata)
    if family not in {architecture.family for architecture in ARCHITECTURES}:
        return False
    try:
        return not read_as_any(file, dialect(adapter.dialect), family).reading.unknown
    except FormatError:
        return False


def title_of(family: str) -> str:
    """What people call a family: `Flux.1`."""
    return next((table.title for table in tables() if table.family == family), family)


def says(metadata: Mapping[str, str]) -> str:
    """What a header says that the adapter was made for, with the entry's name; empty if nothing."""
    return next((f"`{key}` is `{metadata[key]}`" for key in BASES if metadata.get(key)), "")


def _candidates(file: Contents, wanted: str | None) -> Sequence[Architecture]:
    """Those that the names do not rule out at once; all, if there is nothing for a denoiser."""
    if wanted is not None:
        return _named(wanted)
    names = "\n".join(key for key in file.specs if not re.search(_TEXT_NAMES, key))
    return [a for a in ARCHITECTURES if re.search(a.signs, names)] or ARCHITECTURES


def _named(wanted: str) -> Sequence[Architecture]:
    found = [a for a in ARCHITECTURES if a.family == wanted]
    if not found:
        known = list(dict.fromkeys(a.family for a in ARCHITECTURES))
        close = suggest(wanted, known)
        raise UsageError(
            f"there is no architecture `{wanted}` for adapters" + (f"; did you mean `{close}`?" if close else ""),
            hint=f"choose one of {', '.join(known)}",
        )
    return found


def _fit(file: Contents, architecture: Architecture, names: Names, reading: Reading) -> _Fit:
    """The evidence for a family.

    Files for Flux in diffusers' names begin with `transformer.`, those for Qwen-Image are bare, as far as programs
    write them (PEFT puts its own word before both).
    """
    wrong = sum(_contradicts(patch, file.specs, architecture) for patch in reading.patches)
    config = file.config or {}
    words = " ".join(file.metadata.get(name, "") or str(config.get(name) or "") for name in BASES).lower()
    return _Fit(
        understood=len(file.specs) - len(reading.unknown),
        fitting=-wrong,
        sound=reading.problem is None,
        deep=_is_deep(reading.patches, names),
        said=any(word in words for word in _SAID.get(architecture.family, ())),
        usual=architecture.family == "flux1" and any(key.startswith(_FLUX_BEGINS) for key in file.specs),
    )


def _rules_out(file: Contents, fit: _Fit, reading: Reading, other: Architecture) -> bool:
    """Whether a family explains everything, and a layer's sizes tell that no other family could that this one is."""
    if (fit.understood, fit.fitting) != (len(file.specs), 0):
        return False
    return any(_contradicts(patch, file.specs, other) for patch in reading.patches)


def _has_denoiser(reading: Reading) -> bool:
    return any(patch.target.component not in _TEXT_WIDTHS for patch in reading.patches)


def _is_deep(patches: Iterable[Patch], names: Names) -> bool:
    """Whether the numbered blocks that an adapter changes are all that the model has, to the last one."""
    reached = _depths(patch.target.module for patch in patches if patch.target.component == names.denoiser)
    depths = _depths(names.modules(names.denoiser, CANONICAL))
    return bool(reached) and all(depths.get(group) == last for group, last in reached.items())


def _depths(modules: Iterable[str]) -> dict[str, int]:
    """Name of a group of numbered blocks -> the highest number."""
    found: dict[str, int] = {}
    for module in modules:
        if numbered := _NUMBERED.match(module):
            found[numbered[1]] = max(found.get(numbered[1], 0), int(numbered[2]))
    return found


def _contradicts(patch: Patch, specs: Mapping[str, Spec], architecture: Architecture) -> bool:
    """Whether the shapes tell that the layer is another model's."""
    wanted = _wanted(patch.target, architecture)
    if wanted is None:
        return False
    try:
        facts = adapters.family(patch.family).check({p: specs[key].shape for p, key in patch.parts.items()}, None)
    except SdopsError:
        return False  # damaged, whatever it is for; the caller looks at that
    start, stop, total = patch.target.share or (0, 1, 1)
    rows = None if facts.rows is None else facts.rows * total // (stop - start)
    return _is_foreign(rows, wanted[0]) or _is_foreign(facts.columns, wanted[1])


def _wanted(target: Target, architecture: Architecture) -> tuple[Collection[int], Collection[int]] | None:
    if target.component in _TEXT_WIDTHS:
        is_attention = target.module.endswith((".q_proj", ".k_proj", ".v_proj", ".q", ".k", ".v"))
        return ((), (_TEXT_WIDTHS[target.component],)) if is_attention else None
    for pattern, rows, columns in architecture.widths:
        if re.fullmatch(pattern, target.module):
            return rows, columns
    return None


def _is_foreign(size: int | None, wanted: Collection[int]) -> bool:
    return size is not None and bool(wanted) and size not in wanted
