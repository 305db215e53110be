"""`FILE:STRENGTH`, as users name what is added to a model: a LoRA, a hypernetwork, custom diffusion."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from sdops.errors import UsageError
from sdops.hub import is_reference

FilePath = str | os.PathLike[str]
Wish = FilePath | tuple[FilePath, float]  # a path, `"PATH:STRENGTH"`, or path and strength


def split_file(text: str) -> tuple[str, str]:
    """The file, and what stands after its colon. A name that holds colons is told by the file that is there."""
    scheme = text.index(":") if is_reference(text) else -1
    colons = [found.start() for found in re.finditer(":", text) if found.start() > scheme]
    for end in (len(text), *reversed(colons)):
        if end and Path(text[:end]).exists():
            return text[:end], text[end + 1 :]
    if not colons:
        return text, ""
    return text[: colons[0]], text[colons[0] + 1 :]


def with_number(wish: Wish) -> tuple[FilePath, float]:
    """The file, and its strength where that is one number; 1 if there is none.

    Raises:
        UsageError: what stands for the strength is no finite number.
    """
    path: FilePath
    given: str | float
    if isinstance(wish, tuple):
        path, given = wish
    else:
        path, given = split_file(wish) if isinstance(wish, str) else (wish, "")
    try:
        strength = float(given or 1 if isinstance(given, str) else given)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(f"`{given}` is no strength", hint=f"a number behind the file: `{Path(path).name}:0.7`")
    return path, strength
