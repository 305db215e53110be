"""Weigh the average of models against their base by how well they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdops.errors import UsageError
from sdops.merges._geometry import delta_gram, onto_base

if TYPE_CHECKING:
    from sdops.merges._geometry import Coefficients, Gram

EXECUTION = "gram"
INPUTS = "base, *models"


def model_stock(gram: Gram) -> Coefficients:
    """t mean(x) + (1 - t) base,   t = N c / (1 + (N - 1) c),   c = mean cosine of the pairs of x_i - base.

    Cosines are of whole tensors; `model_stock_rows` takes every output channel by itself. A model that equals the
    base has cosine 0 with all others. For c <= 0, changes that oppose each other, t is 0 (mergekit lets it become
    negative, without bound near c = -1 / (N - 1)). sd-mecha takes the cosines of consecutive pairs alone.

    Source: Jang et al., Model Stock, https://arxiv.org/abs/2403.19522; arcee-ai/mergekit, `model_stock`.

    Raises:
        UsageError: there is only one model besides the base.
    """
    count = len(gram) - 1
    if count < 2:
        raise UsageError("`model_stock` compares models with each other, and there is only one", hint="add a model")
    deltas = delta_gram(gram)
    norms = np.sqrt(np.maximum(deltas.diagonal(), 0))
    scale = norms[:, None] * norms
    cosines = np.where(scale > 0, deltas / np.where(scale > 0, scale, 1.0), 0.0).clip(-1, 1)
    cosine = (cosines.sum() - cosines.trace()) / (count * (count - 1))
    ratio = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
    return onto_base(np.full(count, ratio / count))
