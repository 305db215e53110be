"""The layers of the architectures that adapters are made for, under all their names.

Names come from `archs/` (the canonical layout) and `layouts/` (what they are called elsewhere).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from sdops import layouts
from sdops.archs.tables import Table, tables
from sdops.core.patch import Target
from sdops.dialects import CANONICAL, Names
from sdops.errors import SdopsError
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
_BLOCKS = r"(?<!\d[._])transformer_blocks"  # U-Nets have some, too: inside numbered blocks
_DOUBLE = rf"double_blocks|single_blocks|{_BLOCKS}"
_TEXT = ("clip_l", "clip_g", "t5xxl")
# Of those that fit equally well, the earlier one is meant.
ARCHITECTURES = (
    Architecture("sd1", _UNET, ("clip_l",), widths=_attention(768)),
    Architecture("sd2", _UNET, ("clip_h",), widths=_attention(1024)),
    Architecture("sdxl", _UNET, ("clip_l", "clip_g"), widths=_attention(2048)),
    Architecture("sdxl_refiner", _UNET, ("clip_g",), widths=_attention(1280)),
    Architecture("qwen_image", _BLOCKS, widths=((r".*\.attn\.to_q", (3072,), (3072,)),)),
    Architecture("flux1", rf"{_DOUBLE}|img_in|x_embedder", ("clip_l", "t5xxl"), widths=_FLUX),
    Architecture("chroma", rf"{_DOUBLE}|distilled_guidance", ("t5xxl",), widths=_FLUX),
    Architecture("flux2", _DOUBLE, widths=_FLUX2),
    Architecture("sd3", rf"joint_blocks|{_BLOCKS}", _TEXT, "", ((_JOINT_QKV, (4608,), (1536,)),)),
    Architecture("sd3", rf"joint_blocks|{_BLOCKS}", _TEXT, "3.5-large", ((_JOINT_QKV, (7296,), (2432,)),)),
    Architecture("wan", r"(?<!\d[._]transformer_)blocks[._]\d+[._](?:self_attn|cross_attn|ffn|attn\d)", ("umt5xxl",)),
    Architecture("z_image", r"layers[._]\d+[._]|refiner", widths=((r".*\.attention\.qkv", (11520,), (3840,)),)),
    Architecture("lumina2", r"layers[._]\d+[._]|refiner", widths=((r".*\.attn\.to_q", (2304,), (2304,)),)),
)


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
    biased = {denoiser.name: _biased(denoiser, variant)}
    for name in architecture.text_encoders:
        table = next(t for t in tables() if t.family == "text_encoder" and t.name == name and t.layout == "hf")
        spellings |= _spellings("text_encoder", table, variant)
        biased[name] = _biased(table, variant)
    return Names(family, denoiser.name, architecture.text_encoders, spellings, biased)


def forget() -> None:
    """Let go of all names, some megabytes: who opens an adapter later looks them up again."""
    names_of.cache_clear()
    _spellings.cache_clear()
    layouts.tables.forget()


def _biased(table: Table, variant: str) -> frozenset[str]:
    """The modules that have a bias."""
    return frozenset(key.removesuffix(".bias") for key in _keys(table, variant) if key.endswith(".bias"))


@cache
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
