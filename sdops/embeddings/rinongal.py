"""The first textual inversion (rinongal/textual_inversion, 2022): one or several placeholders, neither name nor step.

Its own files hold a `torch.nn.ParameterDict`; sdops writes a plain dict, which the same code reads and which needs no
class to be imported.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import single
from sdops.embeddings._string_to_param import TOKEN, has_tensor_tokens, parameters
from sdops.embeddings._types import Contents, Embedding, Vectors, Written, by_encoder

CONTAINERS = ("torch",)
ENDING = {"torch": ".pt"}
HOLDS_MANY = True


def sniff(contents: Contents) -> bool:
    """A dict of placeholders whose numbers are tensors, or of several."""
    found = parameters(contents)
    return bool(found) and (has_tensor_tokens(contents) or len(found) > 1)


def read(contents: Contents) -> list[Embedding]:
    """Each placeholder is one; the only one is called after the file."""
    found = parameters(contents)
    return [
        Embedding(contents.stem if len(found) == 1 else token, by_encoder(contents.vectors(item)), placeholder=token)
        for token, item in found.items()
    ]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The only one under its placeholder, several under their names.

    Raises:
        MismatchError: one has vectors for several encoders.
    """
    named = {one.name if len(embeddings) > 1 else one.placeholder: single(one, "rinongal") for one in embeddings}
    import numpy as np

    numbers = {token: Vectors(np.array(TOKEN, np.int64), "I64") for token in named}
    return [Written({"string_to_token": numbers, "string_to_param": named})]
