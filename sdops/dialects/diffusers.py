"""diffusers: `unet.down_blocks.0...to_q.lora_A.weight`, a prefix for the component and PEFT's names for the factors.

Bare files without prefix (DiffSynth, Qwen-Image) and those of late 2023 (`.lora.down.weight`) are read as well. Alphas
may be tensors, as Flux files have them, or lie in the header under `lora_adapter_metadata`; neither is read by every
program, so the alpha is folded into `lora_B` when writing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._peft import from_header
from sdops.dialects._read import Contents, Reading, bundled, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling, diffusers, pipeline_prefixes
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(
    r"(?:unet|transformer|text_encoder(?:_\d)?|down_blocks|up_blocks|mid_block|transformer_blocks"
    r"|single_transformer_blocks|x_embedder|context_embedder|time_text_embed|time_embedding|conv_in|conv_out"
    r"|add_embedding|norm_out|proj_out|condition_embedder|img_in|txt_in|layers|noise_refiner|context_refiner)\."
)
SUFFIXES = {
    ("lora", "up"): ".lora_B.weight",
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up_bias"): ".lora_B.bias",
    ("lora", "magnitude"): ".lora_magnitude_vector",
}
SPELLING = Spelling("diffusers", ".", pipeline_prefixes, diffusers, alphas="fold", dora="magnitude", suffixes=SUFFIXES)


def score(keys: Collection[str]) -> float:
    """The prefixes, or the first parts of the names."""
    return share_of(keys, _KEYS.match)


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches and bundled embeddings; alphas from the header where it has them."""
    return read_stems(file.specs, stems(names), settings=from_header(file.metadata), extra=bundled)


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA and DoRA per output; alphas folded into `lora_B`."""
    return write_common(adapter, SPELLING, names, values)
