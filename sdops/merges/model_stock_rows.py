"""Weigh the average of models against their base, each output channel by how well they agree in it."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from sdops.errors import UsageError
from sdops.merges._rows import as_rows, inner

EXECUTION = "rows"


def model_stock_rows(base: Tensor, *models: Tensor) -> Tensor:
    """t mean(x) + (1 - t) base for every row,   t = N c / (1 + (N - 1) c),   c = mean cosine of its pairs of deltas.

    A row is all that has the same index in dimension 0. t = 0 for c <= 0. mergekit takes vectors along the last
    dimension, which is the same for matrices but not for convolutions.

    Source: Jang et al., Model Stock, https://arxiv.org/abs/2403.19522; arcee-ai/mergekit, `filter_wise`.

    Raises:
        UsageError: there is only one model besides the base.
    """
    count = len(models)
    if count < 2:
        raise UsageError(
            "`model_stock_rows` compares models with each other, and there is only one", hint="add a model"
        )
    deltas = [as_rows(model - base) for model in models]
    exact = [delta.double() for delta in deltas]
    squares = [inner(delta, delta) for delta in exact]
    cosine = torch.zeros_like(squares[0])  # (r, 1)
    for i, j in combinations(range(count), 2):
        scale = (squares[i] * squares[j]).sqrt()
        cosine += (inner(exact[i], exact[j]) / torch.where(scale > 0, scale, 1.0)).clamp(-1, 1)
    cosine /= count * (count - 1) / 2
    ratio = torch.where(cosine > 0, count * cosine / (1 + (count - 1) * cosine), 0.0)
    change = torch.stack(deltas).sum(0) * (ratio / count).to(base.dtype)
    return base + change.reshape(base.shape)
