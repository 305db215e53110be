"""The vectors of new words: how many, what they begin as, and how long they are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdops.training.model import Model
from sdops.training.parameters import Parameter

RATE = 5e-3


class Vectors:
    """New words of a model, one stretch of vectors per encoder.

    Args:
        model: Whose encoders get them.
        words: New word -> number of vectors.
        beginnings: New word -> encoder -> rows to begin with.
        keep_norm: Whether every vector is kept as long as the vocabulary's median.
    """

    def __init__(
        self,
        model: Model,
        words: Mapping[str, int],
        beginnings: Mapping[str, Mapping[str, Tensor]],
        *,
        keep_norm: bool = True,
    ) -> None:
        self.words = dict(words)
        self._model, self._beginnings = model, beginnings
        self._norms = {encoder.name: encoder.words.usual_norm for encoder in model.encoders} if keep_norm else {}

    def parameters(self, rate: float, decay: float = 0.0, until: int | None = None) -> list[Parameter]:
        """One tensor [vectors of all words, width] per encoder."""
        found = []
        for encoder in self._model.encoders:
            rows = torch.cat([self._beginnings[word][encoder.name] for word in self.words])
            found.append(Parameter(f"words:{encoder.name}", self._scaled(encoder.name, rows), rate, decay, until))
        return found

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Put the vectors beside the vocabularies."""
        for encoder in self._model.encoders:
            encoder.words.use(parts[f"words:{encoder.name}"])

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Give vectors the length of the vocabulary's. Measured: costs nothing, and without it they grow tenfold."""
        for name in self._norms:
            rows = views[f"words:{name}"]
            rows.copy_(self._scaled(name, rows))

    def product(self, values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """New word -> encoder -> rows."""
        found: dict[str, dict[str, Tensor]] = {word: {} for word in self.words}
        for encoder in self._model.encoders:
            pieces = torch.split(values[f"words:{encoder.name}"], list(self.words.values()))
            for word, rows in zip(self.words, pieces, strict=True):
                found[word][encoder.name] = rows
        return found

    def _scaled(self, name: str, rows: Tensor) -> Tensor:
        if name not in self._norms:
            return rows
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
        return rows * self._norms[name] / lengths
