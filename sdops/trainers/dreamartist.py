"""DreamArtist (Dong et al. 2022, arXiv:2211.11337): a new word and its negative, learnt together.

    eps = eps_neg + s (eps_pos - eps_neg),   s = `guidance`

The pair is saved as two embeddings, `NAME` and `NAME-neg`, for prompt and negative prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdops.core.noise import Noise
from sdops.trainers._named import NEGATIVE, words_of
from sdops.trainers._vectors import RATE, Vectors
from sdops.training import method
from sdops.training.beginnings import beginnings_of
from sdops.training.config import Config
from sdops.training.feeder import Batch
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product
from sdops.training.tokens import LENGTH, Tokens

_APART = 1e-3  # deviation of the noise that sets the negative vectors apart from each other at first


class Method(method.Method):
    """Vectors of words and of their negatives."""

    encodes = True
    rate = RATE

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        positive = words_of(config)
        negative = {f"{word}{NEGATIVE}": config.negative_vectors for word in positive}
        self.words = positive | negative
        beginnings = beginnings_of(model, config, self.words)
        for word in negative:
            for encoder, rows in beginnings[word].items():
                noise = Noise(config.seed, f"{word} {encoder}").normal(0, rows)
                beginnings[word][encoder] = rows + _APART * noise
        self._vectors = Vectors(model, self.words, beginnings, keep_norm=config.keep_norm)
        size = model.encoders[0].words.size
        tokens = Tokens(self.words, size)
        text = " ".join(negative)
        self._negative = {  # for texts of one chunk of 75 tokens, of two ...
            chunks: {
                encoder.name: torch.tensor(tokens.rows([text], encoder.pad, chunks, chunks), device=model.device)
                for encoder in model.encoders
            }
            for chunks in range(1, config.chunks + 1)
        }

    def parameters(self) -> list[Parameter]:
        """The vectors of all words."""
        return self._vectors.parameters(self.config.word_lr or self.lr, self.weight_decay)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Put them beside the vocabularies."""
        self._vectors.use(parts)

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Keep their lengths."""
        self._vectors.after_step(views)

    def predict(self, noisy: Tensor, batch: Batch) -> Tensor:
        """The guided prediction."""
        number = len(noisy)
        positive, pooled = self.text(batch)
        ids_of = self._negative[positive.shape[1] // LENGTH]
        negative, other = self.model.text({name: ids.expand(number, -1) for name, ids in ids_of.items()})
        both = self.model.predict(
            torch.cat([noisy, noisy]),
            torch.cat([batch.steps, batch.steps]),
            torch.cat([negative, positive]),
            None if pooled is None or other is None else torch.cat([other, pooled]),
            None if batch.sizes is None else torch.cat([batch.sizes, batch.sizes]),
        )
        without, given = both.chunk(2)
        return without + self.config.guidance * (given - without)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The words and their negatives."""
        return Product(words=self._vectors.product(values))
