"""One tensor per text encoder: `clip_l`, `clip_g`, `t5`, and `clip_l_out` ... for vectors behind the encoder.

kohya, OneTrainer and diffusers' pivotal tuning write this for SDXL, SD3 and Flux, and web UIs and ComfyUI read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings._common import only, tokens
from sdops.embeddings._types import OUT, Contents, Embedding, Written, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors", "torch")
ENDING = {"safetensors": ".safetensors", "torch": ".pt"}
HOLDS_MANY = False
# In the file -> as sdops calls it.
SPELLINGS = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5xxl", "t5xxl": "t5xxl"}
_WRITTEN = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5xxl": "t5"}


def encoder(name: str) -> str | None:
    """`t5_out` -> `t5xxl_out`; None for what names no encoder."""
    base = SPELLINGS.get(name.removesuffix(OUT))
    return None if base is None else base + (OUT if name.endswith(OUT) else "")


def spelled(name: str) -> str | None:
    """The other way round."""
    base = _WRITTEN.get(name.removesuffix(OUT))
    return None if base is None else base + (OUT if name.endswith(OUT) else "")


def sniff(contents: Contents) -> bool:
    """Nothing but encoders."""
    found = contents.entries()
    return bool(found) and all(type(name) is str and encoder(name) and is_rows(item) for name, item in found.items())


def read(contents: Contents) -> list[Embedding]:
    """Called after the file."""
    parts = {encoder(name) or name: contents.vectors(item) for name, item in contents.entries().items()}
    return [Embedding(contents.stem, parts)]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """One tensor per encoder.

    Raises:
        MismatchError: there are several embeddings, or it is for an encoder without a name.
    """
    one = only(embeddings, "encoders")
    tree = {}
    for name, rows in tokens(one, "encoders").items():
        key = spelled(name)
        if key is None:
            raise MismatchError(
                f"no text encoder has {rows.width} numbers a vector, as `{one.name}` has",
                hint="`--to kohya` or `--to diffusers` holds it",
            )
        tree[key] = rows
    return [Written(tree, {"format": "pt"})]
