"""diffusers of 2023: `...attn1.processor.to_q_lora.down.weight`.

Text encoders: `text_encoder...q_proj.lora_linear_layer.down.weight`. The oldest files hold a U-Net alone, without the
prefix `unet.`. Attention only, no alpha.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._read import Contents, Reading, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling, diffusers, pipeline_prefixes
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"\.processor\.to_(?:q|k|v|out)_lora\.|\.lora_linear_layer\.")
_ATTENTION = re.compile(r"(?P<head>.+\.attn\d?)\.(?P<layer>to_q|to_k|to_v|to_out)(?:\.0)?")
_TEXT = re.compile(r".+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc\d)")
SUFFIXES = {("lora", "up"): ".up.weight", ("lora", "down"): ".down.weight"}


def _rename(module: str) -> str | None:
    if found := _ATTENTION.fullmatch(module):
        return f"{found['head']}.processor.{found['layer']}_lora"
    return f"{module}.lora_linear_layer" if _TEXT.fullmatch(module) else None


SPELLING = Spelling(
    "diffusers_old", ".", pipeline_prefixes, diffusers, alphas="fold", dora="none", suffixes=SUFFIXES, rename=_rename
)
_BARE = replace(SPELLING, prefixes=lambda names, component: pipeline_prefixes(names, component)[-1:])


def score(keys: Collection[str]) -> float:
    """The processors and linear layers."""
    return share_of(keys, _KEYS.search)


def stems(names: Names) -> Mapping[str, Target]:
    """All layers; the grammar of suffixes takes `_lora` and `.lora_linear_layer` for its own."""
    found = SPELLING.stems(names)
    return {stem.removesuffix("_lora").removesuffix(".lora_linear_layer"): target for stem, target in found.items()}


def read(file: Contents, names: Names) -> Reading:
    """Patches."""
    return read_stems(file.specs, stems(names))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA of attention layers; alphas folded into `up`. A U-Net alone gets no prefix."""
    alone = all(patch.target.component == names.denoiser for patch in adapter.patches)
    return write_common(adapter, _BARE if alone else SPELLING, names, values)
