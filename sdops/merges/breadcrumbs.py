"""Add the changes of medium size: outliers and small ones are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._knobs import share
from sdops.merges._sparse import add_changes, kept_count, kept_deltas, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "ranked"


def breadcrumbs(
    base: Tensor,
    *models: Tensor,
    kept: Tensor,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i d_i,   d_i = the deltas x_i - base that fall into the window of sizes, the others 0.

    Small tensors keep at least one element, unlike in the paper's code and in mergekit.

    Source: Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795; arcee-ai/mergekit.

    Args:
        weights: One number per model, the base not counted; none means 1 for each.
        scale: Factor of the merged change (lambda in the paper).
        normalize: Divide by the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is wrong, or a knob is outside its range.
    """
    changes = kept_deltas(base, models, kept)
    return add_changes(base, changes, weights, elect=False, normalize=normalize, scale=scale)


def scores(base: Tensor, *models: Tensor) -> Tensor:
    """|x_i - base|, one row per model."""
    return magnitudes(base, models)


def window(numel: int, *, density: float = 0.5, gamma: float = 0.01, min_numel: int = 0) -> tuple[int, int]:
    """The density * numel largest changes that follow the gamma * numel largest of all.

    If density and gamma add up to more than 1, fewer of the largest are dropped.

    Args:
        density (0 to 1): Share of the changes that each model keeps; more than 0 keeps at least one per tensor.
        gamma (0 to 1): Share of the changes that counts as outliers and is dropped.
        min_numel: Tensors with fewer elements (biases, norms) keep all.
    """
    if numel < min_numel:
        return 0, numel
    count = kept_count(numel, density)
    first = min(int(share("gamma", gamma) * numel), numel - count)
    return first, first + count
