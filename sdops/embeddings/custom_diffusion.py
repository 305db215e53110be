"""The new words in a custom-diffusion file; its matrices are something else.

Source: adobe-research/custom-diffusion. Its diffusers training saves {`unet`: ..., `modifier_token`: {word: [768]}},
the older one {`state_dict`: {..., `embed`: [n, 768]}}, where the words are <new1>, <new2> ...
"""

from __future__ import annotations

from typing import Any

from sdops.embeddings._types import Contents, Embedding, Vectors, by_encoder, is_rows


def _words(contents: Contents) -> dict[str, Any]:
    words = contents.entries().get("modifier_token")
    return {str(word): item for word, item in words.items() if is_rows(item)} if type(words) is dict else {}


def _matrix(contents: Contents) -> Any:
    inner = contents.entries().get("state_dict")
    return inner.get("embed") if type(inner) is dict else None


def sniff(contents: Contents) -> bool:
    """A dict of words, or a matrix of them."""
    return bool(_words(contents)) or is_rows(_matrix(contents))


def read(contents: Contents) -> list[Embedding]:
    """Each word is one."""
    if words := _words(contents):
        return [Embedding(word, by_encoder(contents.vectors(item)), placeholder=word) for word, item in words.items()]
    rows = contents.vectors(_matrix(contents))
    names = [f"<new{number}>" for number in range(1, len(rows) + 1)]
    return [
        Embedding(name, by_encoder(Vectors(rows.values[number : number + 1], rows.dtype)), placeholder=name)
        for number, name in enumerate(names)
    ]
