"""A tensor and nothing else: [width] or [n, width].

One row of 768 may also be the mean of CLIP image embeddings that aesthetic gradients use; nothing in the file, not even
its norm, decides that, so it is AMBIGUOUS until the user says which.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, squeezed
from sdops.embeddings._types import AMBIGUOUS, NULL_TEXT, TOKENS, Contents, Embedding, Written, by_encoder, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = False
_IMAGE_WIDTH = 768


def sniff(contents: Contents) -> bool:
    """A tensor of one or more rows."""
    return is_rows(contents.tree)


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    rows = contents.vectors(contents.tree)
    ambiguous = len(rows) == 1 and rows.width == _IMAGE_WIDTH
    return [Embedding(contents.stem, by_encoder(rows), kind=AMBIGUOUS if ambiguous else TOKENS)]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The tensor; also of CLIP image vectors.

    Raises:
        MismatchError: there are several embeddings, or tensors.
    """
    one = only(embeddings, "bare")
    if len(one.vectors) != 1 or one.kind == NULL_TEXT:
        raise MismatchError(
            f"`bare` files hold one tensor of vectors, `{one.name}` ({one.kind}) has {', '.join(one.vectors)}",
            hint="`--to encoders` holds vectors for several encoders, `--to null_text` a list",
        )
    return [Written(squeezed(next(iter(one.vectors.values()))))]
