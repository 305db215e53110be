"""`null_text` as google/prompt-to-prompt keeps it: a torch file with a list of one text [1, 77, width] per step."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings import null_text
from sdops.embeddings._types import Contents, Embedding, Vectors, Written

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """As `null_text`, which reads all of its forms."""
    return null_text.sniff(contents)


def read(contents: Contents) -> list[Embedding]:
    """As `null_text`."""
    return null_text.read(contents)


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The list.

    Raises:
        MismatchError: it is something else.
    """
    (written,) = null_text.write(embeddings)
    steps: Vectors = written.tree[null_text.NAME]
    return [Written([Vectors(step[None], steps.dtype) for step in steps.values])]
