"""As `png`, with the embedding in the pixels, which lossless copies in other formats keep, and in no text chunk."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings import png
from sdops.embeddings._image import png as encoded
from sdops.embeddings._pixels import picture_of
from sdops.embeddings._types import Contents, Embedding, Written

CONTAINERS = ("png",)
ENDING = {"png": ".png"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """As `png`, which reads both."""
    return png.sniff(contents)


def read(contents: Contents) -> list[Embedding]:
    """As `png`."""
    return png.read(contents)


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """A picture of noise.

    Raises:
        MismatchError: as `png`.
    """
    return [Written(encoded(picture_of(png.dict_of(embeddings))))]
