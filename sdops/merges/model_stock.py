"""Weigh the average of models against their base by how well they agree."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._geometry import delta_gram, onto_base

EXECUTION = "gram"
INPUTS = "base, *models"


def model_stock(gram: Tensor) -> Tensor:
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
    norms = deltas.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, deltas / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1, 1)
    cosine = (cosines.sum() - cosines.trace()) / (count * (count - 1))
    ratio = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else torch.zeros_like(cosine)
    return onto_base((ratio / count).expand(count))
