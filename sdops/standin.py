"""Files on this disk that stand in for files elsewhere, so that whatever reads files can read those, too.

A stand-in has the name and the size of the other file and none of its content. `formats._file.InputFile` reads through
the StandIn behind it; who needs a file with content asks `real`. In messages the other file's name goes before that of
its stand-in. On Windows, and in file systems without holes, nothing of this is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

Anywhere = str | os.PathLike[str]


class StandIn(Protocol):
    """The file elsewhere.

    Attributes:
        reference: Its name there, which does not change and leads to the same bytes for ever.
        sha256: Of its content, if that is known without reading it.
        stream: Whether it is read where it is, to the end, and kept nowhere.
    """

    reference: str
    sha256: str | None
    stream: bool

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; safe to call from several threads."""

    def prepare(self) -> None:
        """All of it will be read: bring it here, unless it is to be kept nowhere."""

    def check(self) -> None:
        """See that what was read of it is what it should be."""

    def fetch(self) -> Path:
        """Bring the whole file here, check it, and say where it is."""

    def content(self) -> bytes:
        """All of a small file, checked, and kept here unless it is streamed."""


_files: dict[str, StandIn] = {}
_names: dict[str, str] = {}


def add(path: Anywhere, file: StandIn) -> None:
    """From now on, the file at `path` stands in for another."""
    _files[os.fspath(path)] = file


def name(folder: Anywhere, shown: str) -> None:
    """From now on, messages call a folder of stand-ins by another name."""
    _names[os.fspath(folder)] = shown


def find(path: Anywhere) -> StandIn | None:
    """What a file stands in for; None for every ordinary file."""
    return _files.get(os.fspath(path)) if _files else None


def is_folder(path: Path) -> bool:
    """Whether it is a folder of stand-ins, or lies in one."""
    return any(os.fspath(each) in _names for each in (path, *path.parents)) if _names else False


def real(path: Path) -> Path:
    """The file with the content: the same, or the one elsewhere, brought here now."""
    file = find(path)
    return path if file is None else file.fetch()


def content(path: Path, most: int = -1) -> bytes:
    """All of a small file, wherever it is; of one on this disk, which may have no end, at most so many bytes."""
    file = find(path)
    if file is not None:
        return file.content()
    with path.open("rb") as opened:
        return opened.read(most)


def prepare(paths: Iterable[Path]) -> None:
    """Have files here before all of their content is read, and before a progress bar is up."""
    for path in paths if _files else ():
        if (file := find(path)) is not None:
            file.prepare()


def is_streaming() -> bool:
    """Whether files elsewhere are read where they are."""
    return any(file.stream for file in _files.values())


def shown(text: str) -> str:
    """A text with stand-ins by the names that the user knows."""
    if "hf:/" in text:  # `Path` makes one slash of two
        text = text.replace("hf:///", "hf:/").replace("hf://", "hf:/").replace("hf:/", "hf://")
    for folder, wanted in _names.items():
        text = text.replace(folder, wanted)
    return text
