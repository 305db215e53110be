"""diffusers' SDXL embeddings: two files, one per encoder, with the same token in both.

`learned_embeds.safetensors` has 768 numbers a vector, `learned_embeds_2.safetensors` 1280. Read one by one they are
plain `diffusers` files; whoever opens one looks for the other (`partner`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdops.embeddings import diffusers
from sdops.embeddings._common import tokens
from sdops.embeddings._types import Contents, Embedding, Written
from sdops.errors import MismatchError

CONTAINERS = ("safetensors", "torch")
ENDING = {"safetensors": ".safetensors", "torch": ".bin"}
HOLDS_MANY = True
_PARTS = {"clip_l": "", "clip_g": "_2"}  # encoder -> behind the file's name


def sniff(contents: Contents) -> bool:
    """Never: one file alone is a `diffusers` file."""
    del contents
    return False


def read(contents: Contents) -> list[Embedding]:
    """As `diffusers`."""
    return diffusers.read(contents)


def partner(stem: str) -> str:
    """What the other file of a pair is called: `a` -> `a_2`, `a_2-steps-500` -> `a-steps-500`."""
    steps = "".join(re.findall(r"-steps-\d+$", stem))
    base = stem.removesuffix(steps)
    return base.removesuffix("_2") + steps if base.endswith("_2") else f"{base}_2{steps}"


def joined(first: Sequence[Embedding], second: Sequence[Embedding]) -> list[Embedding] | None:
    """The embeddings of two files as those of both encoders; None if the files are no pair."""
    other = {one.placeholder: one for one in second}
    if {one.placeholder for one in first} != set(other):
        return None
    pairs = []
    for one in first:
        both = {**one.vectors, **other[one.placeholder].vectors}
        if set(both) != set(_PARTS) or one.rows != other[one.placeholder].rows:
            return None
        pairs.append(Embedding(one.name, {name: both[name] for name in _PARTS}, placeholder=one.placeholder))
    return pairs


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """Two files.

    Raises:
        MismatchError: one is not for SDXL's two encoders.
    """
    for one in embeddings:
        if set(tokens(one, "diffusers_sdxl")) != set(_PARTS):
            raise MismatchError(
                f"`diffusers_sdxl` is for clip_l and clip_g, `{one.name}` has {', '.join(one.vectors)}",
                hint="`--to diffusers` holds one encoder's vectors",
            )
    files = []
    for encoder, suffix in _PARTS.items():
        part = [Embedding(one.name, {encoder: one.vectors[encoder]}, placeholder=one.placeholder) for one in embeddings]
        files += [Written(file.tree, file.metadata, suffix) for file in diffusers.write(part)]
    return files
