"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): new words that stand for what the pictures show.

Only their n vectors of d numbers are parameters, never the vocabulary. SDXL has a pair of vectors for each, one per
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.trainers._named import words_of
from sdops.trainers._vectors import RATE, Vectors
from sdops.training import method
from sdops.training.beginnings import beginnings_of
from sdops.training.config import Config
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product


class Method(method.Method):
    """Vectors of new words."""

    encodes = True
    rate = RATE

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.words = words_of(config)
        self._vectors = Vectors(model, self.words, beginnings_of(model, config, self.words), keep_norm=config.keep_norm)

    def parameters(self) -> list[Parameter]:
        """The vectors."""
        return self._vectors.parameters(self.config.word_lr or self.lr, self.weight_decay)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Put them beside the vocabularies."""
        self._vectors.use(parts)

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Keep their lengths."""
        self._vectors.after_step(views)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The words."""
        return Product(words=self._vectors.product(values))
