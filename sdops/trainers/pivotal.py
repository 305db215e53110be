"""Pivotal tuning (Roich et al. 2021; cloneofsimo/lora): new words first, and a LoRA around them.

The words learn during the first `words_until` of the steps, the layers throughout. Both are saved in one LoRA file,
the words as `bundle_emb`, which the web UIs load along with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.trainers import lora
from sdops.trainers._named import words_of
from sdops.trainers._vectors import Vectors
from sdops.training.beginnings import beginnings_of
from sdops.training.config import Config
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product

RATE = 5e-4  # of the words


class Method(lora.Method):
    """Words and adapters."""

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.encodes = True
        self.words = words_of(config)
        beginnings = beginnings_of(model, config, self.words)
        self._vectors = Vectors(model, self.words, beginnings, keep_norm=config.keep_norm)
        self._until = round(config.steps * config.words_until)

    def parameters(self) -> list[Parameter]:
        """The layers' parts and the vectors."""
        return super().parameters() + self._vectors.parameters(self.config.word_lr or RATE, until=self._until)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Hand out both."""
        super().use({name: part for name, part in parts.items() if not name.startswith("words:")})
        self._vectors.use(parts)

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Keep the words' lengths."""
        self._vectors.after_step(views)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """Both, for one file."""
        found = super().product({name: value for name, value in values.items() if not name.startswith("words:")})
        found.words = self._vectors.product(values)
        return found
