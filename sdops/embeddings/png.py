"""An embedding in a picture's text chunk or pixels, as AUTOMATIC1111 saves its previews; written as a text chunk.

The chunk is looked at first. Other kinds of pictures (WebP, JPEG XL, AVIF) can only have it in their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdops.embeddings import a1111
from sdops.embeddings._image import pixels, png, stored
from sdops.embeddings._pixels import hidden, parsed, text_of
from sdops.embeddings._types import Contents, Embedding, Written
from sdops.errors import FormatError

CONTAINERS = ("png",)
ENDING = {"png": ".png"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """Any picture."""
    return type(contents.tree) is bytes


def read(contents: Contents) -> list[Embedding]:
    """What the chunk, else the pixels hold.

    Raises:
        FormatError: the picture holds no embedding, or a damaged one.
    """
    text = stored(contents.tree)
    tree = hidden(pixels(contents.tree)) if text is None else parsed(text)
    inner = Contents(tree, {}, contents.stem, contents.load)
    if not a1111.sniff(inner):
        raise FormatError(
            f"the picture `{contents.stem}` holds no embedding",
            hint="previews lose it when they are cropped, resized or saved as JPEG",
        )
    return a1111.read(inner)


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """A plain picture with the embedding as text.

    Raises:
        MismatchError: there are several embeddings, or vectors for several encoders.
    """
    tree = a1111.write(embeddings)[0].tree
    return [Written(png(np.full((64, 64, 3), 0x80, np.uint8), text_of(tree)))]
