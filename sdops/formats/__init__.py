"""SHELF: containers of tensors. One file is one container.

Each module offers
    sniff(path: Path, head: bytes) -> bool      is this file (first 4 KiB given) or folder mine?
    open(path: Path) -> Source                  headers only; refuses damaged and hostile files
and executes nothing that a file contains.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Protocol

from sdops.core.source import Source
from sdops.formats._file import read_head, unreadable
from sdops.formats._guess import unknown

# Asked in this order, because a shard is a safetensors file as well.
ORDER = ("safetensors", "torch_zip", "torch_legacy")


class FileSource(Source, Protocol):
    """A Source that lies on the disk.

    Attributes:
        path: As the user gave it.
        files: Every file that holds tensors.
    """

    path: Path
    files: list[Path]

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file was written to, replaced or removed since it was opened."""


def open_source(path: str | os.PathLike[str]) -> FileSource:
    """Open a model file or folder of any format, told by its content.

    Raises:
        SdopsError: there is nothing of that name; a similar name is suggested.
        FormatError: it is no model, or damaged; the message says what it looks like.
    """
    path = Path(path)
    try:
        head = b"" if path.is_dir() else read_head(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    for name in ORDER:
        module = import_module(f"{__name__}.{name}")
        if module.sniff(path, head):
            source: FileSource = module.open(path)
            return source
    raise unknown(path, head)
