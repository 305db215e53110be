"""Files that are no models and hold more than named tensors; which verb knows one. No numpy: `inspect` asks."""

from __future__ import annotations

from pathlib import Path

from sdops import custom_diffusion, embeddings, hypernetworks
from sdops.core.source import Source
from sdops.core.tree import Leaf, Saved
from sdops.embeddings._types import Contents, Vectors
from sdops.errors import FormatError, SdopsError
from sdops.formats import open_source, open_tree
from sdops.formats._file import read_head

_PICTURES: tuple[tuple[int, bytes], ...] = (
    (0, b"\x89PNG"), (8, b"WEBP"), (0, b"\x00\x00\x00\x0cJXL "), (0, b"\xff\x0a"), (4, b"ftypavif"),
)  # fmt: skip


def is_picture(path: Path) -> bool:
    """Whether a file begins as those kinds of pictures do that embeddings are hidden in."""
    head = read_head(path)
    return any(head[start:].startswith(magic) for start, magic in _PICTURES)


def open_saved(path: Path) -> tuple[Saved, Source, str]:
    """What a file holds, its tensors, and its container: `torch` or `safetensors` (or what has named tensors, too).

    Raises:
        SdopsError: the file is missing or no model.
    """
    if tree := open_tree(path):
        return Saved(tree[0], tree[1].metadata, path.stem), tree[1], "torch"
    source = open_source(path)
    return (
        Saved({key: Leaf(key, spec) for key, spec in source.specs.items()}, source.metadata, path.stem),
        source,
        ("safetensors"),
    )


def verb_for(path: Path) -> str:
    """`hypernet`, `custom` or `embed`: the verb that knows such a file; empty if none does, or it cannot be read."""
    try:
        if path.is_file() and is_picture(path):
            return "embed"
        saved, source, _ = open_saved(path)
    except SdopsError:
        return ""
    source.close()
    if hypernetworks.find(saved):
        return "hypernet"
    if custom_diffusion.find(saved):
        return "custom"
    return "embed" if embeddings.find(Contents(saved.tree, saved.metadata, saved.stem, _closed)) else ""


def _closed(leaf: Leaf) -> Vectors:
    raise FormatError(f"`{leaf.key}` is not read to tell what a file is")
