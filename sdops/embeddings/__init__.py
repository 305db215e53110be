"""SHELF: layouts of textual-inversion embeddings and their kin. One file is one layout.

Each module offers
    sniff(contents) -> bool                  is what the file holds laid out so? Told by structure, never by file name
    read(contents) -> list[Embedding]        all of them, in the order of the file; raises FormatError
and, if sdops writes it, too,
    CONTAINERS: tuple[str, ...]              `torch`, `safetensors`, `png`: what it may lie in, the usual one first
    ENDING: dict[str, str]                   container -> ending of such files
    HOLDS_MANY: bool                         whether one file may hold several embeddings
    write(embeddings) -> list[Written]       one file, seldom two; raises MismatchError for what it cannot hold
A layout opens no file and knows no containers: it sees a tree of plain values and tensors (`_types.Contents`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sdops.embeddings._types import Contents

# Asked in this order: the telling structures first, a dict of any tensors nearly last.
ORDER = (
    "png", "hcp", "rinongal", "a1111", "custom_diffusion", "bundle", "cloneofsimo", "encoders", "cog", "onetrainer",
    "kohya", "history", "clip_image", "null_text", "diffusers_sdxl", "diffusers", "bare", "checkpoint",
)  # fmt: skip
WRITABLE = (
    "a1111", "rinongal", "hcp", "diffusers", "diffusers_sdxl", "kohya", "encoders", "cog", "onetrainer", "history",
    "bundle", "cloneofsimo", "bare", "png", "png_pixels", "clip_image", "null_text", "null_text_list",
)  # fmt: skip


def layout(name: str) -> Any:
    """The module of a layout."""
    return import_module(f"{__name__}.{name}")


def find(contents: Contents) -> str | None:
    """The layout of a file; None if it holds no embedding."""
    return next((name for name in ORDER if layout(name).sniff(contents)), None)
