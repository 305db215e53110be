"""SHELF: layouts of custom-diffusion files: new keys and values of cross attention, and new words. One file is one.

Each module offers
    sniff(saved) -> bool             is what the file holds laid out so? Told by structure, never by file name
    read(saved) -> Concepts          raises FormatError
    holds(kinds) -> bool             whether it has room for edits of all these kinds
    write(edits, words) -> Written   edits called as LAYERS says; words: name -> [n, width]
    LAYERS: str                      the spelling of the U-Net whose names it has: `canonical` (LDM's) or `diffusers`
    WORDS: str                       inside; table: all in one, called `embed`; else the layout of embeddings beside it
    NAMES: dict[str, str]            container -> what its files are called, {} for the concept; the usual one first
A layout opens no file, reads no value and computes nothing. Source of the method: Kumari et al., Multi-Concept
Customization of Text-to-Image Diffusion, CVPR 2023.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sdops.core.tree import Saved

# adobe: whole matrices. compressed: the same program's factors. webui: deltas or factors. diffusers: its processors.
ORDER = ("webui", "diffusers", "compressed", "adobe", "compvis")


def layout(name: str) -> Any:
    """The module of a layout."""
    return import_module(f"{__name__}.{name}")


def find(saved: Saved) -> str | None:
    """The layout of a file; None if it is none of custom diffusion."""
    return next((name for name in ORDER if layout(name).sniff(saved)), None)
