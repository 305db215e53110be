"""kohya-ss/sd-scripts and LyCORIS: `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, underscores throughout.

SD1 and SD2 modules have diffusers' names, all others those of the original repositories (SDXL: sgm, Flux: bfl, SD3:
sai). Text encoders are `lora_te_` where there is one, else `lora_te1_` CLIP-L, `lora_te2_` CLIP-G, `lora_te3_` T5. SDXL
files with diffusers' names are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects import _spelling
from sdops.dialects._names import CANONICAL, DIFFUSERS, Names
from sdops.dialects._read import Contents, Reading, bundled, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"(?:lora_unet|oft_unet|lora_te\d?)_")
_NUMBERS = {"clip_l": "1", "clip_g": "2", "t5xxl": "3"}
_DIFFUSERS_NAMED = ("sd1", "sd2")


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    if component == names.denoiser:
        return "lora_unet_", "oft_unet_", "lora_unet_unet_"  # the last from a broken converter
    if len(names.text_encoders) == 1:
        return "lora_te_", "lora_te1_", "lora_te_text_encoder_"
    return (f"lora_te{_NUMBERS.get(component, 1 + names.text_encoders.index(component))}_",)


def _layout(names: Names, component: str) -> str:
    return DIFFUSERS if names.architecture in _DIFFUSERS_NAMED and component == names.denoiser else CANONICAL


SPELLING = _spelling.Spelling("kohya", "_", _prefixes, _layout, norm_names=True, bundles=True)


def score(keys: Collection[str]) -> float:
    """The prefixes."""
    return share_of(keys, _KEYS.match)


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches, and embeddings bundled as `bundle_emb.NAME...`."""
    return read_stems(file.specs, stems(names), extra=bundled)


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Every family; alphas as tensors."""
    return write_common(adapter, SPELLING, names, values)
