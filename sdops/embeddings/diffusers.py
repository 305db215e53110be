"""diffusers' `learned_embeds`: {token: [width] or [n, width]}, in a `.bin` or in safetensors, any number of tokens.

cloneofsimo's `.ti.pt` files are the same. Tokens may hold brackets, blanks and any letters.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import single, squeezed
from sdops.embeddings._types import WIDTHS, Contents, Embedding, Written, by_encoder, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors", "torch")
ENDING = {"safetensors": ".safetensors", "torch": ".bin"}
HOLDS_MANY = True
_MOST = 1000  # tokens; a file of more tensors is something else


def sniff(contents: Contents) -> bool:
    """Nothing but tensors as wide as tokens are, or one tensor of any width."""
    found = contents.entries()
    if not 0 < len(found) <= _MOST or not all(type(token) is str and is_rows(item) for token, item in found.items()):
        return False
    widths = () if len(found) == 1 else tuple(WIDTHS)
    return all(is_rows(item, widths) and not token.endswith((".weight", ".bias")) for token, item in found.items())


def read(contents: Contents) -> list[Embedding]:
    """Each token is one, and called after it."""
    return [
        Embedding(token, by_encoder(contents.vectors(item)), placeholder=token)
        for token, item in contents.entries().items()
    ]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """Under its token, or under its name if it has none of its own.

    Raises:
        MismatchError: one has vectors for several encoders, or two have one token.
    """
    tree = {}
    for one in embeddings:
        token = one.label
        if token in tree:
            raise MismatchError(f"two embeddings have the token `{token}`", hint="`--only NAME` takes one of them")
        tree[token] = squeezed(single(one, "diffusers"))
    return [Written(tree, {"format": "pt"})]
