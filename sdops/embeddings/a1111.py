"""AUTOMATIC1111's embeddings: one placeholder, with name, step and checkpoint. What most `.pt` files are.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion; embedding-inspector and embedding-merge write
the same. DreamArtist's pairs are two such files, `X` and `X-neg`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, single
from sdops.embeddings._string_to_param import TOKEN, number, parameters, text
from sdops.embeddings._types import Contents, Embedding, Written, by_encoder

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = False


def sniff(contents: Contents) -> bool:
    """A dict of placeholders."""
    return bool(parameters(contents))


def read(contents: Contents) -> list[Embedding]:
    """Each placeholder is one; several are called after it."""
    found = parameters(contents)
    own = text(contents, "name") or contents.stem
    return [
        Embedding(
            own if len(found) == 1 else token,
            by_encoder(contents.vectors(item)),
            placeholder=token,
            step=number(contents, "step"),
            checkpoint=text(contents, "sd_checkpoint"),
            checkpoint_name=text(contents, "sd_checkpoint_name"),
        )
        for token, item in found.items()
    ]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """Always under the placeholder "*": the web UI asks for the file's name instead.

    Raises:
        MismatchError: there are several embeddings, or vectors for several encoders.
    """
    one = only(embeddings, "a1111")
    tree = {
        "string_to_token": {"*": TOKEN},
        "string_to_param": {"*": single(one, "a1111")},
        "name": one.name,
        "step": one.step,
        "sd_checkpoint": one.checkpoint,
        "sd_checkpoint_name": one.checkpoint_name,
    }
    return [Written(tree)]
