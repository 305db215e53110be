"""What several layouts do alike: one embedding for one encoder, its rows as the array that most files hold."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._types import CLIP_IMAGE, NULL_TEXT, OUT, Embedding, Vectors
from sdops.errors import MismatchError


def only(embeddings: Sequence[Embedding], layout: str) -> Embedding:
    """The one embedding that a layout has room for.

    Raises:
        MismatchError: there are several.
    """
    if len(embeddings) != 1:
        raise MismatchError(
            f"`{layout}` files hold one embedding, here are {len(embeddings)}",
            hint="`--only NAME` takes one of them; `--to diffusers` or `--to bundle` holds several",
        )
    return embeddings[0]


def single(embedding: Embedding, layout: str) -> Vectors:
    """The rows of an embedding for one encoder.

    Raises:
        MismatchError: it has several, or vectors that are no words.
    """
    parts = tokens(embedding, layout)
    if len(parts) != 1 or next(iter(parts)).endswith(OUT):
        raise MismatchError(
            f"`{layout}` files hold vectors for one text encoder, `{embedding.name}` has {', '.join(parts)}",
            hint="`--to encoders` holds several; `--encoder NAME` takes one",
        )
    return next(iter(parts.values()))


def tokens(embedding: Embedding, layout: str) -> dict[str, Vectors]:
    """The rows of an embedding by encoder.

    Raises:
        MismatchError: they do not stand for words.
    """
    if embedding.kind in (CLIP_IMAGE, NULL_TEXT):
        raise MismatchError(
            f"`{embedding.name}` ({embedding.kind}) does not stand for words, so `{layout}` files cannot hold it",
            hint=f"`--to {embedding.kind.replace('-', '_')}` makes a safetensors file of it",
            kind=embedding.kind,
        )
    return dict(embedding.vectors)


def squeezed(rows: Vectors) -> Vectors:
    """One row without its dimension of rows, as most programs store it."""
    return Vectors(rows.values[0], rows.dtype) if len(rows) == 1 else rows
