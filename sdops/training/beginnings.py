"""What new words begin as: the vectors of known words, or of a formula."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.errors import UsageError
from sdops.pipelines.clip_words import clip_words
from sdops.training.config import Config
from sdops.training.model import Encoder, Model

_USUAL = "*"  # what words begin as if nobody says anything; it means little
_SIGNS = frozenset("+*/()[]#'\"")


def beginnings_of(model: Model, config: Config, words: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """New word -> encoder -> its vectors to begin with, float32 [vectors, width].

    Raises:
        UsageError: there are more texts to begin with than words, or one has no tokens.
    """
    if len(config.init) > len(words):
        raise UsageError(
            f"there are {len(config.init)} texts to begin with for {len(words)} new words",
            hint="one `--init` for each of `--tokens`, in that order",
            key="init",
        )
    texts = [*config.init, *[_USUAL] * (len(words) - len(config.init))]
    return {word: _of(model, text, words[word]) for word, text in zip(words, texts, strict=True)}


def _of(model: Model, text: str, count: int) -> dict[str, Tensor]:
    if _SIGNS & set(text) and text != _USUAL:
        found = model.formula(text)
    else:
        found = {encoder.name: rows_of(encoder, text) for encoder in model.encoders}
    return {name: _spread(rows, count) for name, rows in found.items()}


def rows_of(encoder: Encoder, text: str) -> Tensor:
    """The vectors of a text's words, float32 [tokens, width].

    Raises:
        UsageError: it has none.
    """
    ids = clip_words().numbers(text)
    if not ids:
        raise UsageError(f"`{text}` has no tokens", hint="`--init` takes words, e.g. `painting`", key="init")
    return encoder.words.weight.detach()[ids].float().cpu()


def _spread(rows: Tensor, count: int) -> Tensor:
    """`count` rows: the first ones, or of too few row i is row floor(i n / count), as A1111 does."""
    chosen = [index * len(rows) // count for index in range(count)] if len(rows) < count else range(count)
    return rows[list(chosen)].clone()
