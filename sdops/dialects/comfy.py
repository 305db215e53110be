"""ComfyUI and ai-toolkit: `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`, the checkpoint's own names.

Text encoders are `text_encoders.clip_l.transformer.`. ComfyUI looks for a Tucker core only beside `lora_up` and
`lora_down`, and leaves out the single numbers that LyCORIS' extraction may keep beside them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import Names
from sdops.dialects._read import Contents, Reading, bundled, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling
from sdops.dialects._suffixes import LYCORIS
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"diffusion_model\.|text_encoders\.")
_READ = {part: suffix for part, suffix in LYCORIS.items() if not part[1].startswith("sparse_")}
SUFFIXES = {**_READ, ("lora", "up"): ".lora_B.weight", ("lora", "down"): ".lora_A.weight"}


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    if component == names.denoiser:
        return "diffusion_model.", "model.diffusion_model."
    return f"text_encoders.{component}.transformer.", f"text_encoders.{component}."


SPELLING = Spelling("comfy", ".", _prefixes, suffixes=SUFFIXES, bundles=True)


def score(keys: Collection[str]) -> float:
    """The prefixes."""
    return share_of(keys, _KEYS.match)


def stems(names: Names) -> Mapping[str, Target]:
    """All layers in both layouts."""
    return SPELLING.stems(names)


def read(file: Contents, names: Names) -> Reading:
    """Patches and bundled embeddings."""
    return read_stems(file.specs, stems(names), extra=bundled)


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Every family; alphas as tensors."""
    return write_common(adapter, SPELLING, names, values)
