"""The dicts `string_to_token` and `string_to_param` that the first program of all wrote, and many after it."""

from __future__ import annotations

from typing import Any

from sdops.core.tree import Leaf
from sdops.embeddings._types import Contents, is_rows

TOKEN = 265  # what "*" is in CLIP's vocabulary


def parameters(contents: Contents) -> dict[str, Any]:
    """Placeholder -> tensor; empty if the file is laid out in another way."""
    found = contents.entries().get("string_to_param")
    return {str(token): item for token, item in found.items() if is_rows(item)} if type(found) is dict else {}


def has_tensor_tokens(contents: Contents) -> bool:
    """Whether the tokens' numbers are tensors, as only the first program has them."""
    tokens = contents.entries().get("string_to_token")
    return type(tokens) is dict and any(type(number) is Leaf for number in tokens.values())


def text(contents: Contents, key: str) -> str | None:
    """A text beside the tensors."""
    found = contents.entries().get(key)
    return found if type(found) is str and found else None


def number(contents: Contents, key: str) -> int | None:
    """A whole number beside the tensors."""
    found = contents.entries().get(key)
    return found if type(found) is int else None
