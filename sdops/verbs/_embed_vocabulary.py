"""The vectors of a model's words, out of any checkpoint, and which of them lie near a vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.archs.detect import component_of, detect
from sdops.core.tree import Leaf
from sdops.embeddings._types import ENCODERS, Vectors, encoder_of
from sdops.errors import MismatchError
from sdops.formats import open_source
from sdops.pipelines.clip_words import ClipWords, clip_words
from sdops.verbs._embed_open import FilePath, Loader

_TABLES = ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
CLIP_ROWS = 49408
_BLOCK = 8192  # rows at once: the double-precision norms of a block stay small


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A word near a vector.

    Attributes:
        number: Of its row.
        word: As people read it.
        value: Cosine, or distance.
    """

    number: int
    word: str
    value: float


@dataclass(frozen=True)
class Table:
    """The vectors of one encoder's words.

    Attributes:
        rows: float32 [words, width].
        words: The vocabulary if it is CLIP's; None for T5's, which does not come with sdops.
    """

    rows: NDArray[np.float32]
    words: ClipWords | None = field(repr=False)

    @property
    def width(self) -> int:
        """Numbers per row."""
        return int(self.rows.shape[1])

    @cached_property
    def norms(self) -> NDArray[np.float32]:
        """Length of each row."""
        squares = [np.einsum("ij,ij->i", block, block) for block in self._blocks()]
        lengths: NDArray[np.float32] = np.sqrt(np.concatenate(squares))
        return lengths

    @cached_property
    def usual(self) -> float:
        """The median length."""
        return float(np.median(self.norms))

    def word(self, number: int) -> str:
        """A row's word, or `#number`."""
        return self.words.shown(number) if self.words else f"#{number}"

    def near(self, rows: NDArray[Any], count: int) -> list[tuple[list[Neighbour], list[Neighbour]]]:
        """For each of the rows [n, width] the words of greatest cosine, and those of least distance."""
        rows = np.nan_to_num(rows.astype(np.float32))
        products = np.concatenate([block @ rows.T for block in self._blocks()])  # [words, n]
        lengths = np.linalg.norm(rows, axis=1)
        found = []
        for index, length in enumerate(lengths):
            inner = products[:, index]
            cosine = inner / np.maximum(self.norms * length, 1e-30)
            distance = np.sqrt(np.maximum(self.norms**2 - 2 * inner + length**2, 0))
            found.append((self._best(cosine, count, largest=True), self._best(distance, count, largest=False)))
        return found

    def _best(self, values: NDArray[np.float32], count: int, *, largest: bool) -> list[Neighbour]:
        order = -values if largest else values
        few = np.argpartition(order, min(count, len(order) - 1))[:count]
        few = few[np.argsort(order[few], kind="stable")]
        return [Neighbour(number, self.word(number), float(values[number])) for number in few.tolist()]

    def _blocks(self) -> list[NDArray[np.float32]]:
        return [self.rows[start : start + _BLOCK] for start in range(0, len(self.rows), _BLOCK)]


@dataclass(frozen=True)
class Vocabulary:
    """A model's words.

    Attributes:
        name: The model, as the user gave it.
        tables: Encoder -> vectors.
    """

    name: str
    tables: dict[str, Table]

    def table(self, encoder: str, width: int) -> Table:
        """The vectors of one encoder.

        Raises:
            MismatchError: the model has no such encoder, or one of another width.
        """
        if encoder not in self.tables:
            raise MismatchError(
                f"`{self.name}` has words for {', '.join(self.tables)}, not for {encoder}",
                hint="give a model of the embedding's family with `--model`",
                encoder=encoder,
            )
        found = self.tables[encoder]
        if found.width != width:
            raise MismatchError(
                f"vectors for {encoder} have {found.width} numbers in `{self.name}`, {width} in the embedding",
                hint="give a model of the embedding's family with `--model`",
                encoder=encoder,
            )
        return found


def read_vocabulary(path: FilePath) -> Vocabulary:
    """The word vectors of all text encoders in a checkpoint, a diffusers folder, or an encoder's own file.

    Raises:
        SdopsError: it cannot be read.
        MismatchError: there is no text encoder inside.
    """
    source = open_source(path)
    try:
        detection = detect(source.specs)
        load, tables = Loader(source), {}
        for key, spec in source.specs.items():
            if not key.endswith(_TABLES) or len(spec.shape) != 2 or not spec.is_float:
                continue
            found = component_of(detection, key)
            name = found if found in ENCODERS else encoder_of(spec.shape[1])
            if name not in tables:
                tables[name] = _table(load(Leaf(key, spec)), is_clip=key.endswith(_TABLES[0]))
    finally:
        source.close()
    if not tables:
        raise MismatchError(
            f"`{Path(path)}` has no text encoder with a table of words",
            hint="give a whole checkpoint, a diffusers folder or a text encoder's file with `--model`",
        )
    return Vocabulary(str(path), {name: tables[name] for name in sorted(tables, key=_order)})


def _table(vectors: Vectors, *, is_clip: bool) -> Table:
    rows = vectors.values[:CLIP_ROWS] if is_clip else vectors.values  # what follows was added by training
    return Table(np.ascontiguousarray(rows, np.float32), clip_words() if is_clip else None)


def _order(name: str) -> tuple[int, str]:
    return (ENCODERS.index(name) if name in ENCODERS else len(ENCODERS)), name
