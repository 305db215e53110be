"""SDXL embeddings of cog-sdxl and its kin (`embeddings.pti`): `text_encoders_0` is CLIP-L, `text_encoders_1` bigG."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, tokens
from sdops.embeddings._types import Contents, Embedding, Written, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".pti"}
HOLDS_MANY = False
_NAMES = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "text_encoders_2": "t5xxl"}


def sniff(contents: Contents) -> bool:
    """Nothing but numbered encoders."""
    found = contents.entries()
    return bool(found) and all(name in _NAMES and is_rows(item) for name, item in found.items())


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    return [
        Embedding(contents.stem, {_NAMES[name]: contents.vectors(item) for name, item in contents.entries().items()})
    ]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """Numbered encoders.

    Raises:
        MismatchError: there are several embeddings, or an encoder that has no number.
    """
    one = only(embeddings, "cog")
    numbered = {encoder: name for name, encoder in _NAMES.items()}
    parts = tokens(one, "cog")
    if "clip_l" not in parts or not set(parts) <= set(numbered):
        raise MismatchError(
            f"`cog` files hold vectors for clip_l and clip_g, `{one.name}` has {', '.join(parts)}",
            hint="`--to encoders` holds them",
        )
    return [Written({numbered[encoder]: rows for encoder, rows in parts.items()}, {"format": "pt"})]
