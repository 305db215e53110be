"""HCP-Diffusion's embeddings for SDXL: the vectors of both encoders side by side, [n, 768 + 1280]."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, tokens
from sdops.embeddings._string_to_param import TOKEN, parameters, text
from sdops.embeddings._types import Contents, Embedding, Vectors, Written, width_of
from sdops.errors import MismatchError

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = False
_FIRST, _BOTH = 768, 2048


def sniff(contents: Contents) -> bool:
    """A dict of placeholders of that width."""
    found = parameters(contents)
    return bool(found) and all(width_of(item) == _BOTH for item in found.values())


def read(contents: Contents) -> list[Embedding]:
    """Split behind the first 768 numbers."""
    found = parameters(contents)
    embeddings = []
    for token, item in found.items():
        both = contents.vectors(item)
        parts = {
            "clip_l": Vectors(both.values[:, :_FIRST], both.dtype),
            "clip_g": Vectors(both.values[:, _FIRST:], both.dtype),
        }
        name = (text(contents, "name") or contents.stem) if len(found) == 1 else token
        embeddings.append(Embedding(name, parts, placeholder=token))
    return embeddings


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """Both encoders side by side.

    Raises:
        MismatchError: there are several embeddings, or it is not for SDXL's two encoders.
    """
    one = only(embeddings, "hcp")
    parts = tokens(one, "hcp")
    if set(parts) != {"clip_l", "clip_g"}:
        raise MismatchError(
            f"`hcp` files hold vectors for clip_l and clip_g, `{one.name}` has {', '.join(parts)}",
            hint="`--to a1111` or `--to encoders` holds them",
        )
    import numpy as np

    both = np.concatenate([parts["clip_l"].values, parts["clip_g"].values], axis=1)
    tree = {
        "string_to_token": {"*": TOKEN},
        "string_to_param": {"*": Vectors(both, wider(parts["clip_l"].dtype, parts["clip_g"].dtype))},
    }
    return [Written(tree)]


def wider(a: str, b: str) -> str:
    """A dtype that holds the values of both exactly."""
    if a == b:
        return a
    return "F64" if "F64" in (a, b) else "F32"
