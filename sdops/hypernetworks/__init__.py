"""SHELF: layouts of hypernetworks, small networks in front of the keys and values of attention. One file is one layout.

Each module offers
    sniff(saved) -> bool             is what the file holds laid out so? Told by structure, never by file name
    read(saved) -> Network           raises FormatError
    write(network) -> Written        a tree of plain values with the same Leafs, or named Leafs with metadata
    ENDING: str                      of such files
    CONTAINER: str                   `torch` or `safetensors`
A layout opens no file, reads no value and computes nothing: Leafs only get other names, so every way there and back
gives the same bits. What a Network means is told in `_types`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sdops.core.tree import Saved

ORDER = ("a1111", "novelai", "safetensors")


def layout(name: str) -> Any:
    """The module of a layout."""
    return import_module(f"{__name__}.{name}")


def find(saved: Saved) -> str | None:
    """The layout of a file; None if it holds no hypernetwork."""
    return next((name for name in ORDER if layout(name).sniff(saved)), None)
