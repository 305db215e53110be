"""CLIP image vectors, as aesthetic gradients use them, in sdops' own unmistakable form: {`clip_image_embed`: [n, 768]}.

The originals (vicgalle/stable-diffusion-aesthetic-gradients) are bare tensors, see `bare`. The vector is the mean of
CLIP ViT-L/14 image embeddings behind the projection, not normalised. It stands for no word.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only
from sdops.embeddings._types import CLIP_IMAGE, Contents, Embedding, Written, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".safetensors"}
HOLDS_MANY = False
NAME = "clip_image_embed"


def sniff(contents: Contents) -> bool:
    """The one name."""
    return is_rows(contents.entries().get(NAME))


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    return [Embedding(contents.stem, {"clip_image": contents.vectors(contents.tree[NAME])}, kind=CLIP_IMAGE)]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The one tensor.

    Raises:
        MismatchError: it stands for words.
    """
    one = only(embeddings, "clip_image")
    if one.kind != CLIP_IMAGE:
        raise MismatchError(
            f"`{one.name}` ({one.kind}) is no CLIP image vector",
            hint="those are bare tensors of one row of 768; `sdops embed inspect` shows what this is",
            kind=one.kind,
        )
    return [Written({NAME: next(iter(one.vectors.values()))}, {"sdops.kind": CLIP_IMAGE})]
