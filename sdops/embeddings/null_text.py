"""Null-text inversion: one unconditional text [77, width] per step, as a list or stacked.

google/prompt-to-prompt saves a list of [1, 77, width], the community pipeline of diffusers one [steps, 1, 77, width].
sdops writes safetensors with the one tensor `null_text` [steps, 77, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdops.core.tree import Leaf
from sdops.embeddings._common import only
from sdops.embeddings._types import NULL_TEXT, Contents, Embedding, Vectors, Written, encoder_of
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".safetensors"}
HOLDS_MANY = False
NAME = "null_text"
_LENGTH = 77


def _is_text(item: Any, dimensions: Sequence[int]) -> bool:
    """Whether it is a float tensor of that many dimensions whose last but one are the places of a text."""
    return (
        type(item) is Leaf
        and item.spec.is_float
        and len(item.spec.shape) in dimensions
        and item.spec.shape[-2] == _LENGTH
        and 0 not in item.spec.shape
    )


def sniff(contents: Contents) -> bool:
    """A list of texts, or texts stacked."""
    tree = contents.tree
    if type(tree) is list:
        return bool(tree) and all(_is_text(item, (2, 3)) and item.spec == tree[0].spec for item in tree)
    return _is_text(tree, (3, 4)) or _is_text(contents.entries().get(NAME), (3, 4))


def read(contents: Contents) -> list[Embedding]:
    """Called after the file; one row is one step."""
    import numpy as np

    tree = contents.tree
    items = tree if type(tree) is list else [tree[NAME] if type(tree) is dict else tree]
    loaded = [contents.load(item) for item in items]
    width = loaded[0].width
    steps = np.concatenate([part.values.reshape(-1, _LENGTH, width) for part in loaded])
    return [Embedding(contents.stem, {encoder_of(width): Vectors(steps, loaded[0].dtype)}, kind=NULL_TEXT)]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The one tensor.

    Raises:
        MismatchError: it is something else.
    """
    one = only(embeddings, "null_text")
    if one.kind != NULL_TEXT:
        raise MismatchError(
            f"`{one.name}` ({one.kind}) is no list of null texts", hint="`sdops embed inspect` shows it"
        )
    return [Written({NAME: next(iter(one.vectors.values()))}, {"sdops.kind": NULL_TEXT})]
