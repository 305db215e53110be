"""cloneofsimo/lora: every token is a tensor [768] of a safetensors file whose metadata say `<embed>` of it.

n vectors are n tokens. LoRA matrices (`unet:0:up`) may lie beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import single
from sdops.embeddings._types import Contents, Embedding, Vectors, Written, by_encoder, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".safetensors"}
HOLDS_MANY = True
_MARK = "<embed>"


def sniff(contents: Contents) -> bool:
    """Any tensor that the metadata call an embedding."""
    return any(contents.metadata.get(str(key)) == _MARK and is_rows(item) for key, item in contents.entries().items())


def read(contents: Contents) -> list[Embedding]:
    """Each token is one."""
    return [
        Embedding(str(key), by_encoder(contents.vectors(item)), placeholder=str(key))
        for key, item in contents.entries().items()
        if contents.metadata.get(str(key)) == _MARK and is_rows(item)
    ]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """A token per vector: `NAME`, or `NAME_0`, `NAME_1` ...

    Raises:
        MismatchError: one is for several encoders, or two have one token.
    """
    tree: dict[str, Vectors] = {}
    for one in embeddings:
        rows = single(one, "cloneofsimo")
        token = one.label
        for number, row in enumerate(rows.values):
            key = token if len(rows) == 1 else f"{token}_{number}"
            if key in tree:
                raise MismatchError(f"two embeddings have the token `{key}`", hint="`--only NAME` takes one of them")
            tree[key] = Vectors(row, rows.dtype)
    return [Written(tree, dict.fromkeys(tree, _MARK))]
