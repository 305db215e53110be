"""The layers of the architectures that adapters are made for, under all their names; and which of them a file means.

Names come from `archs/` (the canonical layout) and `layouts/` (what they are called elsewhere).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from sdops import adapters, layouts
from sdops.archs.tables import Table, tables
from sdops.core.patch import Patch, Target
from sdops.core.spec import Spec
from sdops.dialects import CANONICAL, Contents, Dialect, Names, Reading
from sdops.errors import FormatError, SdopsError
from sdops.layouts.tables import made_of

_PARAMETER = re.compile(r"\.(?:weight|bias|scale)$")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family that adapters are made for.

    Attributes:
        family, variant: As in the architecture tables.
        signs: Regular expression; some name of an adapter for its denoiser contains this, in any dialect.
        text_encoders: In the order in which programs number them.
        widths: Regular expression on modules -> rows (None = any), columns that such a weight can have.
    """

    family: str
    signs: str
    text_encoders: tuple[str, ...] = ()
    variant: str = ""
    widths: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()


def _attention(width: int) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]:
    return ((r".*\.attn2\.to_[kv]", (), (width,)),)


_FLUX = (
    (r".*\.img_attn\.(qkv|proj)", (), (3072,)),
    (r".*\.img_mlp\.0", (12288,), (3072,)),
    (r".*\.linear1", (21504,), (3072,)),
    (r".*\.linear2", (3072,), (15360,)),
)
_JOINT_QKV = r".*\.x_block\.attn\.qkv"
_FLUX2 = (
    (r".*\.img_attn\.(qkv|proj)", (), (3072, 4096, 6144)),
    (r".*\.img_mlp\.0", (18432, 24576, 36864), (3072, 4096, 6144)),
    (r".*\.linear1", (27648, 36864, 55296), (3072, 4096, 6144)),
    (r".*\.linear2", (3072, 4096, 6144), (12288, 16384, 24576)),
)
_UNET = r"(?:down|up|input|output)_blocks|mid_block|middle_block|unet:\d"
_DOUBLE = r"double_blocks|single_blocks|transformer_blocks"
_TEXT = ("clip_l", "clip_g", "t5xxl")
# Of those that fit equally well, the earlier one is meant.
ARCHITECTURES = (
    Architecture("sd1", _UNET, ("clip_l",), widths=_attention(768)),
    Architecture("sd2", _UNET, ("clip_h",), widths=_attention(1024)),
    Architecture("sdxl", _UNET, ("clip_l", "clip_g"), widths=_attention(2048)),
    Architecture("sdxl_refiner", _UNET, ("clip_g",), widths=_attention(1280)),
    Architecture("qwen_image", "transformer_blocks", widths=((r".*\.attn\.to_q", (3072,), (3072,)),)),
    Architecture("flux1", rf"{_DOUBLE}|img_in|x_embedder", ("clip_l", "t5xxl"), widths=_FLUX),
    Architecture("chroma", rf"{_DOUBLE}|distilled_guidance", ("t5xxl",), widths=_FLUX),
    Architecture("flux2", _DOUBLE, widths=_FLUX2),
    Architecture("sd3", "joint_blocks|transformer_blocks", _TEXT, "", ((_JOINT_QKV, (4608,), (1536,)),)),
    Architecture("sd3", "joint_blocks|transformer_blocks", _TEXT, "3.5-large", ((_JOINT_QKV, (7296,), (2432,)),)),
    Architecture("wan", r"blocks[._]\d+[._](?:self_attn|cross_attn|ffn|attn\d)", ("umt5xxl",)),
    Architecture("z_image", r"layers[._]\d+[._]|refiner", widths=((r".*\.attention\.qkv", (11520,), (3840,)),)),
    Architecture("lumina2", r"layers[._]\d+[._]|refiner", widths=((r".*\.attn\.to_q", (2304,), (2304,)),)),
)
_TEXT_NAMES = r"text_model|text_encoder|lora_te|encoder[._]block"
_TEXT_WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280, "t5xxl": 4096, "umt5xxl": 4096}
# What headers call the families; believed only where names and shapes leave a choice.
_SAID = {
    "sd1": ("sd_v1", "sd_1.5", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2"),
    "sdxl": ("sdxl", "stable-diffusion-xl"),
    "flux1": ("flux1", "flux-1"),
    "sd3": ("sd3", "stable-diffusion-3"),
    "chroma": ("chroma",),
    "qwen_image": ("qwen",),
}


@cache
def names_of(family: str, variant: str = "") -> Names:
    """All names of an architecture's layers.

    Raises:
        SdopsError: adapters for this family are not known.
    """
    architecture = next((a for a in ARCHITECTURES if (a.family, a.variant) == (family, variant)), None)
    if architecture is None:
        known = " ".join(dict.fromkeys(a.family for a in ARCHITECTURES))
        raise SdopsError(f"adapters for `{family}` are not known", hint=f"known are {known}", family=family)
    denoiser = next(table for table in tables() if table.family == family and table.kind == "model" and table.keys)
    spellings = dict(_spellings(family, denoiser, variant))
    for name in architecture.text_encoders:
        table = next(t for t in tables() if t.family == "text_encoder" and t.name == name and t.layout == "hf")
        spellings |= _spellings("text_encoder", table, variant)
    return Names(family, denoiser.name, architecture.text_encoders, spellings)


def _spellings(family: str, table: Table, variant: str) -> Mapping[tuple[str, str], Mapping[str, Target]]:
    """Layout -> module -> what it is, of one component."""
    keys = _keys(table, variant)
    own = {module: Target(table.name, module) for key in keys if (module := _module(key))}
    found: dict[tuple[str, str], Mapping[str, Target]] = {(table.name, CANONICAL): own}
    for layout in layouts.tables.layouts(family, table.name):
        if layout in (table.layout, "openclip"):  # OpenCLIP's parameters are no modules that adapters could be on
            continue
        found[table.name, layout] = _modules_of(table, made_of(family, table.name, table.layout, layout, keys))
    return found


def _keys(table: Table, variant: str) -> list[str]:
    """All keys that any variant has; those of one depth alone, where depths differ in what names mean."""
    if variant:
        return table.expected(tuple(each for each in table.variants if each.name == variant))
    deep = {a.variant for a in ARCHITECTURES if a.family == table.family}
    each = [table.expected(), *(table.expected((v,)) for v in table.variants if v.name not in deep)]
    return list(dict.fromkeys(key for keys in (*each, table.optional_names()) for key in keys))


def _modules_of(table: Table, made: Mapping[str, Sequence[layouts.tables.Part]]) -> dict[str, Target]:
    modules: dict[str, Target] = {}
    for key, parts in made.items():
        module, original = _module(key), _module(parts[0].key)
        if module and original and len(parts) == 1:
            swapped = parts[0].operation == "swap"
            modules.setdefault(module, Target(table.name, original, parts[0].share, swapped))
    return modules


def _module(key: str) -> str:
    """The module that a tensor belongs to; empty for parameters that belong to none."""
    found = _PARAMETER.search(key)
    return key[: found.start()] if found else ""


# --------------------------------------------------------------------------------------- which architecture is meant


def read_as_any(file: Contents, dialect: Dialect) -> tuple[Architecture, Reading]:
    """Read a file as an adapter of the architecture that explains it best.

    Raises:
        FormatError: it explains nothing as any, or is damaged.
    """
    best: tuple[tuple[float, ...], Architecture, Reading] | None = None
    error: FormatError | None = None
    for architecture in _candidates(file):
        try:
            reading = dialect.read(file, names_of(architecture.family, architecture.variant))
        except FormatError as failed:
            error = error or failed
            continue
        closeness = _closeness(file, architecture, reading)
        if best is None or closeness > best[0]:
            best = closeness, architecture, reading
    if best is None or (error is not None and not best[2].patches):
        raise error or FormatError("no architecture fits", hint="see the names with `sdops inspect FILE`")
    return best[1], best[2]


def _candidates(file: Contents) -> Sequence[Architecture]:
    """Those that the names do not rule out at once; all, if there is nothing for a denoiser."""
    names = "\n".join(key for key in file.specs if not re.search(_TEXT_NAMES, key))
    return [a for a in ARCHITECTURES if re.search(a.signs, names)] or ARCHITECTURES


def _closeness(file: Contents, architecture: Architecture, reading: Reading) -> tuple[float, ...]:
    """Keys understood; patches whose sizes contradict; what the header says; whose pipeline is spelled.

    Names and sizes of attention-only files for Flux in diffusers' names fit Qwen-Image as well, if they hold none of
    Flux's single blocks, nor blocks above Flux's 19. Those of Flux then begin with `transformer.`, those of Qwen-Image
    are bare, as far as programs write them.
    """
    understood = len(file.specs) - len(reading.unknown)
    wrong = sum(_contradicts(patch, file.specs, architecture) for patch in reading.patches)
    said = " ".join(file.metadata.get(name, "") for name in ("ss_base_model_version", "modelspec.architecture"))
    hinted = any(word in said.lower() for word in _SAID.get(architecture.family, ()))
    spelled = architecture.family == "flux1" and any(key.startswith("transformer.") for key in file.specs)
    return understood, -wrong, hinted, spelled


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


def _wanted(target: Target, architecture: Architecture) -> tuple[Iterable[int], Iterable[int]] | None:
    if target.component in _TEXT_WIDTHS:
        is_attention = target.module.endswith((".q_proj", ".k_proj", ".v_proj", ".q", ".k", ".v"))
        return ((), (_TEXT_WIDTHS[target.component],)) if is_attention else None
    for pattern, rows, columns in architecture.widths:
        if re.fullmatch(pattern, target.module):
            return rows, columns
    return None


def _is_foreign(size: int | None, wanted: Iterable[int]) -> bool:
    choices = tuple(wanted)
    return size is not None and bool(choices) and size not in choices
