"""Embeddings of two files as tensors of the same names, whatever their layouts: the vectors of every text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from sdops.core.spec import Spec
from sdops.errors import SdopsError
from sdops.formats import FileSource
from sdops.verbs._counterparts import Model


class _Vectors:
    """Vectors under the name of their encoder; of several words in a file, with the word before it."""

    def __init__(self, origin: FileSource) -> None:
        from sdops.core.precision import encode
        from sdops.verbs._embed_open import open_embeddings

        embeddings = open_embeddings(origin.path).embeddings
        self.name, self.metadata = origin.name, origin.metadata
        specs: dict[str, Spec] = {}
        self._data: dict[str, bytes] = {}
        for one in embeddings:
            for encoder, vectors in one.vectors.items():
                key = encoder if len(embeddings) == 1 else f"{one.placeholder} {encoder}"
                specs[key] = Spec(vectors.dtype, vectors.values.shape)
                self._data[key] = encode(vectors.values.astype("f8").reshape(-1), vectors.dtype)[0].tobytes()
        self.specs: Mapping[str, Spec] = specs

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """From memory."""
        buffer[:] = self._data[key][start : start + len(buffer)]

    def close(self) -> None:
        """Nothing to release."""


def as_vectors(a: Model, b: Model) -> tuple[Model, Model] | None:
    """Two files of embeddings as vectors; None if they are no such, or have the same names anyhow."""
    if not a.detection.family == b.detection.family == "embedding" or a.source.specs.keys() == b.source.specs.keys():
        return None
    try:
        return _told(a), _told(b)
    except SdopsError:  # not understood
        return None


def _told(model: Model) -> Model:
    from sdops.verbs._counterparts_adapter import FileView

    source = _Vectors(model.origin)
    return replace(model, origin=cast("FileSource", FileView(model.origin, source)), source=source)
