"""adobe-research/custom-diffusion, trained with diffusers (`delta.bin`): {`unet`: {layer: weight}, `modifier_token`}.

The weights are whole: they take the place of the model's. `modifier_token` is {word: [width]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from sdops.core.tree import Leaf, Saved
from sdops.custom_diffusion._types import (
    Concepts,
    Edit,
    Written,
    as_vectors,
    is_all_attention,
    leaves,
    named,
    wholes,
    words_of,
)

LAYERS, WORDS = "diffusers", "inside"
NAMES = {"torch": "{}.bin"}


def sniff(saved: Saved) -> bool:
    """A dict `unet` of cross attention's layers, or such layers beside words."""
    inner = saved.entries().get("unet")
    return type(inner) is dict and is_all_attention(leaves(inner))


def read(saved: Saved) -> Concepts:
    """Layers and words."""
    edits, unknown = wholes(leaves(saved.tree["unet"]))
    return Concepts(edits, words_of(saved.tree.get("modifier_token")), unknown)


def holds(kinds: AbstractSet[str]) -> bool:
    """Whole parameters."""
    return kinds == {"whole"}


def write(edits: Sequence[Edit], words: Mapping[str, Leaf]) -> Written:
    """The two dicts."""
    return Written({"unet": named(edits), "modifier_token": as_vectors(words)})
