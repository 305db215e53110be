"""Words that were added to a model's vocabulary: rows behind the 49,408 of CLIP in the table of tokens.

DreamBooth with textual inversion, EveryDream2 and custom diffusion's converter leave them there. Their names are lost:
they are called `added0`, `added1` ... by their rows.
"""

from __future__ import annotations

from typing import Any

from sdops.core.tree import Leaf
from sdops.embeddings._types import Contents, Embedding, Vectors, encoder_of

VOCABULARY = 49408
_TABLE = "token_embedding.weight"


def tables(contents: Contents) -> dict[str, Any]:
    """Encoder -> the table of tokens that has more rows than CLIP has words."""
    found: dict[str, Any] = {}
    for key, item in contents.entries().items():
        if type(key) is str and key.endswith(_TABLE) and type(item) is Leaf and len(item.spec.shape) == 2:
            rows, width = item.spec.shape
            if rows > VOCABULARY and item.spec.is_float:
                found.setdefault(encoder_of(width), item)
    return found


def sniff(contents: Contents) -> bool:
    """A table with too many rows."""
    return bool(tables(contents))


def read(contents: Contents) -> list[Embedding]:
    """Each added row is one, with those of all encoders together."""
    added = {}
    for encoder, item in tables(contents).items():
        table = contents.load(item)
        added[encoder] = Vectors(table.values[VOCABULARY:].copy(), table.dtype)
    most = max(len(rows) for rows in added.values())
    return [
        Embedding(
            f"added{number}",
            {
                encoder: Vectors(rows.values[number : number + 1], rows.dtype)
                for encoder, rows in added.items()
                if number < len(rows)
            },
        )
        for number in range(most)
    ]
