"""What a custom-diffusion file holds: for layers of cross attention new weights or what is added to them, and words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sdops.core.spec import Spec
from sdops.core.tree import Leaf

Kind = Literal["whole", "delta", "factors"]
# The parameters that the method trains; with `crossattn` all of them, without it keys and values.
LAYER = re.compile(r"(?P<block>.+\.attn2)\.(?P<layer>to_k|to_v|to_q|to_out\.0)\.(?P<parameter>weight|bias)")
LDM = "model.diffusion_model."
PREFIXES = (LDM, "unet.", "")


@dataclass(frozen=True, slots=True)
class Edit:
    """One parameter of a layer.

    Attributes:
        layer: Dotted name without prefix, e.g. `input_blocks.1.1.transformer_blocks.0.attn2.to_k`, as LDM or diffusers
            call it.
        parameter: `weight` or `bias`.
        kind: whole: it takes the place of the model's; delta: it is added; factors: u @ v is added.
        tensors: One, or u [o, r] and v [r, i].
    """

    layer: str
    parameter: str
    kind: Kind
    tensors: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter: [o, i], a bias [o]."""
        return (*self.tensors[0].spec.shape[:1], *self.tensors[-1].spec.shape[1:])


@dataclass(frozen=True, slots=True)
class Word:
    """A new word.

    Attributes:
        name: E.g. `<new1>`.
        leaf: Its vector [width], or a table of words [n, width].
        row: Which row of the table; None for a vector.
    """

    name: str
    leaf: Leaf
    row: int | None = None


@dataclass(frozen=True)
class Concepts:
    """A custom-diffusion file.

    Attributes:
        edits: In the order of the file.
        words: Those that lie in it.
        unknown: Tensors that are neither.
    """

    edits: tuple[Edit, ...]
    words: tuple[Word, ...] = ()
    unknown: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Written:
    """A file to be.

    Attributes:
        tree: Plain values with Leafs; safetensors hold those that lie in no other dict, and nothing else.
        metadata: For safetensors.
    """

    tree: dict[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


def without_prefix(name: str) -> str:
    """The name of a tensor within the U-Net."""
    return next(name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix))


def whole(name: str, leaf: Leaf) -> Edit | None:
    """A tensor that takes the place of a parameter of cross attention; None if it is something else."""
    found = LAYER.fullmatch(without_prefix(name))
    if found is None or not leaf.spec.is_float:
        return None
    return Edit(f"{found['block']}.{found['layer']}", found["parameter"], "whole", (leaf,))


def wholes(tensors: Mapping[str, Leaf]) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
    """Whole parameters, and the names that are something else."""
    found = {name: whole(name, leaf) for name, leaf in tensors.items()}
    edits = tuple(edit for edit in found.values() if edit is not None)
    return edits, tuple(name for name, edit in found.items() if edit is None)


def leaves(entries: Mapping[object, object]) -> dict[str, Leaf]:
    """The named tensors of a dict."""
    return {str(name): item for name, item in entries.items() if type(name) is str and type(item) is Leaf}


def is_all_attention(tensors: Mapping[str, Leaf]) -> bool:
    """Whether there is a key or value of cross attention, and nothing but its layers."""
    names = [without_prefix(name) for name in tensors]
    return any(LAYER.fullmatch(name) for name in names) and all(LAYER.fullmatch(name) for name in names)


def words_of(entries: object) -> tuple[Word, ...]:
    """{word: vector}, as `modifier_token` has them."""
    if type(entries) is not dict:
        return ()
    return tuple(Word(name, leaf) for name, leaf in leaves(entries).items() if len(leaf.spec.shape) in (1, 2))


def words_in(table: object) -> tuple[Word, ...]:
    """A table [n, width] of words that are called <new1>, <new2> ..., or a single vector."""
    if type(table) is not Leaf or not table.spec.is_float or len(table.spec.shape) not in (1, 2):
        return ()
    if len(table.spec.shape) == 1:
        return (Word("<new1>", table),)
    return tuple(Word(f"<new{row + 1}>", table, row) for row in range(table.spec.shape[0]))


def named(edits: Sequence[Edit], prefix: str = "") -> dict[str, Leaf]:
    """Whole parameters under their names."""
    return {f"{prefix}{edit.layer}.{edit.parameter}": edit.tensors[0] for edit in edits}


def as_vectors(words: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Words as `modifier_token` has them: those of one row [1, width] as a vector [width]."""
    return {
        name: Leaf(leaf.key, Spec(leaf.spec.dtype, leaf.spec.shape[1:])) if leaf.spec.shape[0] == 1 else leaf
        for name, leaf in words.items()
    }
