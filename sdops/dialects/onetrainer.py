"""OneTrainer's legacy files, for all architectures diffusers' names with underscores: `lora_transformer_..._attn_to_q`.

U-Nets are `lora_unet_`. The text encoders are numbered as the pipeline has them, so Flux' T5 is `lora_te2_`. Embeddings
trained along are `bundle_emb.TOKEN.clip_l`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._read import Contents, Reading, bundled, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling, diffusers
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"lora_transformer_|lora_unet_(?:down_blocks|up_blocks|mid_block)_|lora_te\d_|bundle_emb\.")
_TELLING = re.compile(r"lora_transformer_|lora_te\d_")
_BUNDLED = re.compile(r"bundle_emb\.")  # others bundle embeddings with kohya's names, too


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    if component == names.denoiser:
        return (f"lora_{component}_",)
    if len(names.text_encoders) == 1:
        return "lora_te_", "lora_te1_"
    return (f"lora_te{1 + names.text_encoders.index(component)}_",)


SPELLING = Spelling("onetrainer", "_", _prefixes, diffusers, norm_names=True, bundles=True)


def score(keys: Collection[str]) -> float:
    """The prefixes, if one of them is not kohya's as well."""
    is_told = any(_TELLING.match(key) for key in keys) or all(_BUNDLED.match(key) for key in keys)
    return share_of(keys, _KEYS.match) if is_told else 0.0


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches and bundled embeddings."""
    return read_stems(file.specs, stems(names), extra=bundled)


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Every family; alphas as tensors."""
    return write_common(adapter, SPELLING, names, values)
