"""OneTrainer's embeddings for one encoder: `emp_params` (its own spelling) and `emp_params_out` behind the encoder."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, tokens
from sdops.embeddings._types import OUT, Contents, Embedding, Written, encoder_of, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".safetensors"}
HOLDS_MANY = False
_NAME = "emp_params"


def sniff(contents: Contents) -> bool:
    """One of the two names."""
    return any(is_rows(contents.entries().get(name)) for name in (_NAME, _NAME + OUT))


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    parts = {}
    for suffix in ("", OUT):
        if is_rows(contents.tree.get(_NAME + suffix)):
            rows = contents.vectors(contents.tree[_NAME + suffix])
            parts[encoder_of(rows.width) + suffix] = rows
    return [Embedding(contents.stem, parts)]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """One or two tensors.

    Raises:
        MismatchError: there are several embeddings, or vectors for several encoders.
    """
    one = only(embeddings, "onetrainer")
    parts = tokens(one, "onetrainer")
    if len({name.removesuffix(OUT) for name in parts}) != 1:
        raise MismatchError(
            f"`onetrainer` files hold vectors for one text encoder, `{one.name}` has {', '.join(parts)}",
            hint="`--to encoders` is what OneTrainer reads for several",
        )
    return [Written({_NAME + (OUT if name.endswith(OUT) else ""): rows for name, rows in parts.items()})]
