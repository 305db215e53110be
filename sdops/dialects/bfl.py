"""Black Forest Labs' control files (Depth, Canny): the checkpoint's own names, bare: `img_in.lora_A.weight`.

They have biases (`lora_B.bias`), and norms that are replaced: `...norm.key_norm.scale`. There is no alpha.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._read import Contents, Reading, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(
    r"(?:double_blocks|single_blocks|joint_blocks|input_blocks|output_blocks|middle_block|blocks|layers|img_in|txt_in"
    r"|time_in|vector_in|guidance_in|final_layer|time_embed|label_emb|x_embedder|context_embedder|t_embedder"
    r"|y_embedder|noise_refiner|context_refiner|distilled_guidance_layer|out)\."
)
SUFFIXES = {
    ("lora", "up"): ".lora_B.weight",
    ("lora", "down"): ".lora_A.weight",
    ("lora", "up_bias"): ".lora_B.bias",
    ("full", "set"): ".scale",
}


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    return ("",) if component == names.denoiser else ()


SPELLING = Spelling("bfl", ".", _prefixes, alphas="fold", dora="none", suffixes=SUFFIXES)


def score(keys: Collection[str]) -> float:
    """The first parts of the names."""
    return share_of(keys, _KEYS.match)


def stems(names: Names) -> Mapping[str, Target]:
    """The denoiser's layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches."""
    return read_stems(file.specs, stems(names))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA, biases, replaced norms; alphas folded into `lora_B`."""
    return write_common(adapter, SPELLING, names, values)
