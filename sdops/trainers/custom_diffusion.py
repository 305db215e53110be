"""Custom diffusion (Kumari et al. 2022, arXiv:2212.04488): keys and values of cross-attention, and a new word.

Saved as the web UI's extension does: differences, and the word in a file beside them, for `sdops custom`; `--to kohya`
makes a LoRA with the word in it, for `sdops apply` and other programs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.trainers._cards import is_of_cross
from sdops.trainers._named import words_of
from sdops.trainers._vectors import Vectors
from sdops.trainers._weights import Weights
from sdops.training import method
from sdops.training.beginnings import beginnings_of
from sdops.training.config import Config
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product


class Method(method.Method):
    """K, V and words."""

    encodes = True
    rate = 1e-5
    decay = 0.01

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.words = words_of(config)
        beginnings = beginnings_of(model, config, self.words)
        self._vectors = Vectors(model, self.words, beginnings, keep_norm=config.keep_norm)
        self._weights = Weights(model, lambda part, name: part == "unet" and is_of_cross(name))

    def parameters(self) -> list[Parameter]:
        """The matrices, then the vectors."""
        weights = self._weights.parameters(lambda _: self.lr, self.weight_decay)
        return weights + self._vectors.parameters(self.config.word_lr or self.lr)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Put them in their places."""
        self._weights.use(parts)
        self._vectors.use(parts)

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Keep the words' lengths."""
        self._vectors.after_step(views)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """Both, for one file."""
        return Product(self._weights.layers(values), self._vectors.product(values))
