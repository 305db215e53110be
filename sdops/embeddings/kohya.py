"""kohya's embeddings for one encoder (kohya-ss/sd-scripts): `emb_params` [n, width]; the name is that of the file."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, single
from sdops.embeddings._types import Contents, Embedding, Written, by_encoder, is_rows

CONTAINERS = ("safetensors", "torch")
ENDING = {"safetensors": ".safetensors", "torch": ".pt"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """The one name."""
    return is_rows(contents.entries().get("emb_params"))


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    return [Embedding(contents.stem, by_encoder(contents.vectors(contents.tree["emb_params"])))]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The one tensor.

    Raises:
        MismatchError: there are several embeddings, or vectors for several encoders.
    """
    return [Written({"emb_params": single(only(embeddings, "kohya"), "kohya")})]
