"""An embedding in a picture's text chunk or pixels, as AUTOMATIC1111 saves its previews; written as a text chunk.

The chunk is looked at first. Other kinds of pictures (WebP, JPEG XL, AVIF) can only have it in their pixels. For SDXL
the web UI reads {`clip_l`, `clip_g`} from either place, called after the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdops.embeddings import a1111, encoders
from sdops.embeddings._types import Contents, Embedding, Written
from sdops.errors import FormatError, MismatchError

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
    from sdops.embeddings._image import pixels, stored  # numpy
    from sdops.embeddings._pixels import hidden, parsed

    text = stored(contents.tree)
    tree = hidden(pixels(contents.tree)) if text is None else parsed(text)
    inner = Contents(tree, {}, contents.stem, contents.load)
    layout = next((each for each in (a1111, encoders) if each.sniff(inner)), None)
    if layout is None:
        raise FormatError(
            f"the picture `{contents.stem}` holds no embedding",
            hint="previews lose it when they are cropped, resized or saved as JPEG",
        )
    found: list[Embedding] = layout.read(inner)
    return found


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """A plain picture with the embedding as text.

    Raises:
        MismatchError: there are several embeddings, or it has vectors that no web UI looks for in a picture.
    """
    import numpy as np

    from sdops.embeddings._image import png
    from sdops.embeddings._pixels import text_of

    return [Written(png(np.full((64, 64, 3), 0x80, np.uint8), text_of(dict_of(embeddings))))]


def dict_of(embeddings: Sequence[Embedding]) -> dict[str, Any]:
    """What is put into a picture: the web UI's dict, for SDXL `clip_l` and `clip_g` and nothing else.

    Raises:
        MismatchError: see `write`.
    """
    several = [one for one in embeddings if len(one.vectors) > 1]
    layout = encoders if several else a1111
    for one in several:
        if set(one.vectors) != {"clip_l", "clip_g"}:
            raise MismatchError(
                f"pictures hold vectors for clip_l and clip_g or for one, `{one.name}` has {', '.join(one.vectors)}",
                hint="`--to encoders` holds them",
            )
    tree: dict[str, Any] = layout.write(embeddings)[0].tree
    return tree
