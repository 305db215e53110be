"""Embeddings inside of a LoRA: `bundle_emb.NAME.clip_l`, as OneTrainer writes them and the web UIs read them.

Names may hold dots, so they are read from the right. For one encoder the web UIs have `string_to_param.*` instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdops.embeddings import encoders
from sdops.embeddings._common import tokens
from sdops.embeddings._types import OUT, Contents, Embedding, Vectors, Written, encoder_of, is_rows
from sdops.errors import MismatchError

CONTAINERS = ("safetensors",)
ENDING = {"safetensors": ".safetensors"}
HOLDS_MANY = True
PREFIX = "bundle_emb."
_PLAIN = ("string_to_param.*", "emb_params", "emp_params")


def sniff(contents: Contents) -> bool:
    """Any such name, whatever else there is."""
    return any(type(key) is str and _split(key) and is_rows(item) for key, item in contents.entries().items())


def _split(key: str) -> tuple[str, str] | None:
    """`bundle_emb.a.b.clip_l` -> (`a.b`, `clip_l`)."""
    if not key.startswith(PREFIX):
        return None
    rest = key.removeprefix(PREFIX)
    for plain in _PLAIN:
        for suffix in ("", OUT):
            if rest.endswith(f".{plain}{suffix}"):
                return rest.removesuffix(f".{plain}{suffix}"), suffix
    name, _, last = rest.rpartition(".")
    known = encoders.encoder(last)
    return (name, known) if name and known else None


def read(contents: Contents) -> list[Embedding]:
    """By name, in the order of the file."""
    parts: dict[str, dict[str, Vectors]] = {}
    for key, item in contents.entries().items():
        found = _split(key) if type(key) is str else None
        if found and is_rows(item):
            name, encoder = found
            rows = contents.vectors(item)
            known = encoder if encoder not in ("", OUT) else encoder_of(rows.width) + encoder
            parts.setdefault(name, {})[known] = rows
    return [Embedding(name, vectors) for name, vectors in parts.items()]


def write(embeddings: Sequence[Embedding]) -> list[Written]:
    """The tensors that go into a LoRA.

    Raises:
        MismatchError: two have one name, or one is for an encoder without a name.
    """
    tree: dict[str, Vectors] = {}
    for one in embeddings:
        for encoder, rows in tokens(one, "bundle").items():
            spelled = encoders.spelled(encoder)
            key = f"{PREFIX}{one.name}.{spelled or _PLAIN[0]}"
            if key in tree:
                raise MismatchError(f"two embeddings are called `{one.name}`", hint="`--only NAME` takes one of them")
            tree[key] = rows
    return [Written(tree, {"format": "pt"})]
