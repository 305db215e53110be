"""oss-roettger/XL-Textual-Inversion: {`emb`: [768], `emb2`: [1280]}, or a list of them, one a save; the last counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdops.embeddings._common import only, squeezed, tokens
from sdops.embeddings._types import Contents, Embedding, Written, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """A dict of the two names, or a list of such dicts."""
    items = contents.tree if type(contents.tree) is list else [contents.tree]
    return bool(items) and all(_is_pair(item) for item in items)


def _is_pair(item: Any) -> bool:
    return type(item) is dict and set(item) == {"emb", "emb2"} and all(is_rows(rows) for rows in item.values())


def read(contents: Contents) -> list[Embedding]:
    """The last of the list first, as the others are its past: `NAME`, then `NAME-0`, `NAME-1` ..."""
    items = contents.tree if type(contents.tree) is list else [contents.tree]
    names = [f"{contents.stem}-{number}" for number in range(len(items) - 1)] + [contents.stem]
    found = [
        Embedding(name, {"clip_l": contents.vectors(item["emb"]), "clip_g": contents.vectors(item["emb2"])})
        for name, item in zip(names, items, strict=True)
    ]
    return [found[-1], *found[:-1]]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """One dict.

    Raises:
        MismatchError: there are several embeddings, or it is not for SDXL's two encoders.
    """
    one = only(embeddings, "history")
    parts = tokens(one, "history")
    if set(parts) != {"clip_l", "clip_g"}:
        raise MismatchError(
            f"`history` files hold vectors for clip_l and clip_g, `{one.name}` has {', '.join(parts)}",
            hint="`--to a1111` or `--to encoders` holds them",
        )
    return [Written({"emb": squeezed(parts["clip_l"]), "emb2": squeezed(parts["clip_g"])})]
