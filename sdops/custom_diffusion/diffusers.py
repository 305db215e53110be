"""diffusers' `pytorch_custom_diffusion_weights`: `{block}.attn2.processor.to_k_custom_diffusion.weight`, whole weights.

In a `.bin` self attention has empty dicts beside them, which safetensors cannot hold. Words lie in files of their own,
`<new1>.safetensors`. diffusers itself does not load these files back (huggingface/diffusers#9320).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import Concepts, Edit, Written, leaves, without_prefix

LAYERS, WORDS = "diffusers", "diffusers"
NAMES = {
    "safetensors": "pytorch_custom_diffusion_weights.safetensors",
    "torch": "pytorch_custom_diffusion_weights.bin",
}

_NAME = re.compile(
    r"(?P<block>.+\.attn2)\.processor\.(?P<layer>to_k|to_v|to_q|to_out)_custom_diffusion(?P<index>\.0)?"
    r"\.(?P<parameter>weight|bias)"
)


def tensors(saved: Saved) -> dict[str, Leaf]:
    """Name -> tensor, of flat files and of dicts by processor."""
    found: dict[str, Leaf] = {}
    for name, item in saved.entries().items():
        if type(item) is dict:
            found |= {f"{name}.{inner}": leaf for inner, leaf in leaves(item).items()}
    return found | leaves(saved.entries())


def sniff(saved: Saved) -> bool:
    """Such names."""
    return any(_NAME.fullmatch(without_prefix(name)) for name in tensors(saved))


def read(saved: Saved) -> Concepts:
    """Whole weights."""
    edits, unknown = [], []
    for name, leaf in tensors(saved).items():
        if found := _NAME.fullmatch(without_prefix(name)):
            layer = f"{found['block']}.{found['layer']}{found['index'] or ''}"
            edits.append(Edit(layer, found["parameter"], "whole", (leaf,)))
        else:
            unknown.append(name)
    return Concepts(tuple(edits), (), tuple(unknown))


def holds(kinds: AbstractSet[str]) -> bool:
    """Whole parameters."""
    return kinds == {"whole"}


def write(edits: Sequence[Edit], words: Mapping[str, Leaf]) -> Written:
    """Its names; self attention has empty dicts, without which diffusers takes a `.bin` for incomplete."""
    del words  # they lie beside it
    blocks = dict.fromkeys(edit.layer.split(".attn2.")[0] for edit in edits)
    empty: dict[str, dict[str, Leaf]] = {f"{block}.attn1.processor": {} for block in blocks}
    return Written(empty | {_written(edit): edit.tensors[0] for edit in edits}, {"format": "pt"})


def _written(edit: Edit) -> str:
    block, _, layer = edit.layer.rpartition(".attn2.")
    name, _, index = layer.partition(".")
    return f"{block}.attn2.processor.{name}_custom_diffusion{'.' + index if index else ''}.{edit.parameter}"
