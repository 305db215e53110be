"""Files that are no models and hold more than named tensors; which verb knows one. No numpy: `inspect` asks."""

from __future__ import annotations

from pathlib import Path

from sdops import custom_diffusion, embeddings, hypernetworks
from sdops.core.source import Source
from sdops.core.tree import Leaf, Saved
from sdops.embeddings._types import WIDTHS, Contents, Vectors
from sdops.errors import FormatError, SdopsError
from sdops.formats import open_source, open_tree
from sdops.formats._file import read_head

_PICTURES: tuple[tuple[int, bytes], ...] = (
    (0, b"\x89PNG"), (8, b"WEBP"), (0, b"\x00\x00\x00\x0cJXL "), (0, b"\xff\x0a"), (4, b"ftypavif"),
)  # fmt: skip
# Verb -> what its files are, and what to do with them in place of a LoRA.
_NO_LORAS = {
    "hypernet": (
        "a hypernetwork",
        "`sdops hypernet apply MODEL {0}` bakes it in, `sdops hypernet to-lora {0}` makes a LoRA",
    ),
    "custom": (
        "custom diffusion",
        "`sdops custom apply MODEL {0}` adds it to a model, `sdops custom to-lora {0}` makes a LoRA",
    ),
    "embed": ("an embedding", "it changes no weights: use it in prompts; `sdops embed inspect {0}` shows it"),
}

_OF_ANY_NAME = ("diffusers", "bare")  # layouts of embeddings in which any tensor could be one


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
    tensors = {key: Leaf(key, spec) for key, spec in source.specs.items()}
    return Saved(tensors, source.metadata, path.stem), source, "safetensors"


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
    found = embeddings.find(Contents(saved.tree, saved.metadata, saved.stem, _closed))
    widths = {spec.shape[-1] for spec in source.specs.values() if spec.shape}
    if found in _OF_ANY_NAME and not widths & WIDTHS.keys():
        return ""  # some tensor, rather than a word
    return "embed" if found else ""


def not_a_lora(path: Path, error: FormatError) -> FormatError:
    """What to say of a file that was to be a LoRA: if another verb knows it, which; else the error as it is."""
    if not (verb := verb_for(path)):
        return error
    kind, hint = _NO_LORAS[verb]
    return FormatError(f"`{path}` is {kind}, no LoRA", hint=hint.format(path), path=path)


def _closed(leaf: Leaf) -> Vectors:
    raise FormatError(f"`{leaf.key}` is not read to tell what a file is")
