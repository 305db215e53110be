"""Several Sources on the disk as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdops.core.source import Place, place
from sdops.core.spec import Spec
from sdops.formats import FileSource


class JoinedSource:
    """Tensors of several Sources under names of their own.

    Args:
        path: As the user gave it.
        places: Tensor name -> (Source, name in it), in the order in which they shall be read.
        parts: All Sources; closed with this one.
        metadata: Text for the whole.
        warnings: What the user should know.

    Attributes:
        files: Every file of every part.
        places: As given; for the position of a tensor in its file see the part's `offsets`.
    """

    def __init__(
        self,
        path: Path,
        places: Mapping[str, tuple[FileSource, str]],
        parts: Sequence[FileSource],
        metadata: Mapping[str, str],
        warnings: Sequence[str] = (),
    ) -> None:
        self.name = path.name or str(path.absolute().name)
        self.path = path
        self.places = places
        self.specs: Mapping[str, Spec] = {key: part.specs[inner] for key, (part, inner) in places.items()}
        self.metadata = metadata
        self.files = [file for part in parts for file in part.files]
        self.warnings = [*warnings, *(warning for part in parts for warning in part.warnings)]
        self._parts = parts

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on.

        Raises:
            ChangedError: the file was cut short or written to since it was opened.
        """
        part, inner = self.places[key]
        part.read_into(inner, start, buffer)

    def place(self, key: str) -> Place | None:
        """Where the tensor's bytes lie, if the part that has it can say so."""
        part, inner = self.places[key]
        return place(part, inner)

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file was written to, replaced or removed since it was opened."""
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        """Release all files."""
        for part in self._parts:
            part.close()
