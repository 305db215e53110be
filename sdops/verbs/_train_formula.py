"""Formulas of words and files (`2*circle - red`, as `sdops embed make` reads them) in a model that is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdops.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.embeddings._types import Embedding
    from sdops.training.model import Encoder
    from sdops.verbs._embed_algebra import Rows
    from sdops.verbs._embed_formula import Meaning


def formula(encoders: Sequence[Encoder], text: str) -> Mapping[str, Tensor]:
    """What a formula of words and files makes, per encoder [n, width].

    Raises:
        UsageError, MismatchError: as `sdops embed make`.
    """
    import torch

    from sdops.verbs._embed_formula import evaluate, files_in
    from sdops.verbs._embed_open import open_embeddings

    files = {file: open_embeddings(file).embeddings[0] for file in files_in(text)}
    made = {}
    for encoder in encoders:
        rows = {file: _of_encoder(one, encoder.name, file) for file, one in files.items()}
        made[encoder.name] = torch.from_numpy(evaluate(text, _meaning(encoder, rows))).float()
    return made


def _meaning(encoder: Encoder, files: Mapping[str, Rows]) -> Meaning:
    """What words and files mean for an encoder."""
    from sdops.pipelines.clip_words import clip_words
    from sdops.verbs._embed_formula import Meaning

    table = encoder.words.weight.detach().double().cpu().numpy()

    def words(text: str) -> Rows:
        found: Rows = table[clip_words().numbers(text)]
        return found

    def row(number: int) -> Rows:
        found: Rows = table[[number]]
        return found

    return Meaning(words, row, files, encoder.words.usual_norm)


def _of_encoder(one: Embedding, name: str, file: str) -> Rows:
    if name not in one.vectors:
        raise MismatchError(
            f"`{file}` has no vectors for {name}", hint=f"it has {', '.join(one.vectors)}: another model's", file=file
        )
    return one.vectors[name].values.astype("f8")
