"""adobe-research/custom-diffusion, trained with CompVis' code: {`state_dict`: {layer: weight, `embed`: [n, 768]}}.

The weights are whole. Words are called <new1>, <new2> ... by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import (
    LDM,
    Concepts,
    Edit,
    Written,
    is_all_attention,
    leaves,
    named,
    wholes,
    words_in,
)

LAYERS, WORDS = "canonical", "table"
NAMES = {"torch": "{}.ckpt"}
EMBED = "embed"


def tensors(saved: Saved) -> dict[str, Leaf]:
    """The named tensors, in `state_dict` or without it."""
    inner = saved.entries().get("state_dict", saved.tree)
    return leaves(inner) if type(inner) is dict else {}


def sniff(saved: Saved) -> bool:
    """Nothing but cross attention's layers and `embed`."""
    found = tensors(saved)
    return is_all_attention({name: leaf for name, leaf in found.items() if name != EMBED})


def read(saved: Saved) -> Concepts:
    """Layers and words."""
    found = tensors(saved)
    edits, unknown = wholes({name: leaf for name, leaf in found.items() if name != EMBED})
    return Concepts(edits, words_in(found.get(EMBED)), unknown)


def holds(kinds: AbstractSet[str]) -> bool:
    """Whole parameters."""
    return kinds == {"whole"}


def write(edits: Sequence[Edit], words: Mapping[str, Leaf]) -> Written:
    """The one dict, the table of words in it."""
    return Written({"state_dict": named(edits, LDM) | dict(words)})
