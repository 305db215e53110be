"""XLabs (and USO) for Flux: `double_blocks.0.processor.qkv_lora1.down.weight`; 1 is the image stream, 2 the text's.

Attention only. In single blocks `qkv_lora` is the first three sevenths of `linear1` and `proj_lora` is `linear2`.
There is no alpha.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache

from sdops.core.patch import Adapter, Target
from sdops.dialects._names import CANONICAL, Names
from sdops.dialects._read import Contents, Reading, read_stems, share_of
from sdops.dialects._recipes import Values
from sdops.dialects._spelling import Spelling
from sdops.dialects._write import Written
from sdops.dialects._write import write as write_common

_KEYS = re.compile(r"\.processor\.(?:qkv|proj)_lora")
_MODULES = re.compile(r"(?:double_blocks\.\d+\.(?:img|txt)_attn\.(?:qkv|proj)|single_blocks\.\d+\.linear[12])")
_QKV = (0, 3, 7)
_LAYOUT = "xlabs"
SUFFIXES = {("lora", "up"): ".up.weight", ("lora", "down"): ".down.weight"}


def _prefixes(names: Names, component: str) -> tuple[str, ...]:
    return ("", "diffusion_model.") if component == names.denoiser else ()


SPELLING = Spelling(
    "xlabs", ".", _prefixes, lambda _names, _component: _LAYOUT, alphas="fold", dora="none", suffixes=SUFFIXES
)


def _spelled(target: Target) -> tuple[str, Target] | None:
    """A module of the canonical layout under XLabs' name."""
    if _MODULES.fullmatch(target.module) is None:
        return None
    block, _, layer = target.module.partition("_attn.")
    if layer:
        head, _, stream = block.rpartition(".")
        return f"{head}.processor.{layer}_lora{1 if stream == 'img' else 2}", target
    head, _, layer = target.module.rpartition(".")
    if layer == "linear1":
        return f"{head}.processor.qkv_lora", replace(target, share=_QKV)
    return f"{head}.processor.proj_lora", target


@cache
def _with_layout(names: Names) -> Names:
    """The names with XLabs' layout added, and no text encoders."""
    modules = names.modules(names.denoiser, CANONICAL).values()
    spelled = dict(found for target in modules if (found := _spelled(target)) is not None)
    return Names(names.architecture, names.denoiser, (), {(names.denoiser, _LAYOUT): spelled})


def score(keys: Collection[str]) -> float:
    """The processors."""
    return share_of(keys, _KEYS.search)


def stems(names: Names) -> Mapping[str, Target]:
    """The attention layers; the grammar of suffixes takes the `_lora` of single blocks for its own."""
    found = SPELLING.stems(_with_layout(names))
    return {**found, **{stem.removesuffix("_lora"): target for stem, target in found.items()}}


def read(file: Contents, names: Names) -> Reading:
    """Patches."""
    return read_stems(file.specs, stems(names))


def write(adapter: Adapter, names: Names, values: Values) -> Written:
    """Plain LoRA of attention layers; alphas folded into `up`."""
    return write_common(adapter, SPELLING, _with_layout(names), values)
