"""Of the largest changes of several models, add those that agree in sign."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._sparse import add_changes, kept_count, kept_deltas, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "ranked"


def ties(
    base: Tensor,
    *models: Tensor,
    kept: Tensor,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """base + scale sum_i w_i d_i a_i / sum_i w_i a_i.

    d_i are the deltas x_i - base, of which each model keeps its largest; a_i is 1 where w_i d_i has the sign of
    sum_j w_j d_j (0 counts as +), else 0. peft elects on unweighted values and divides by the number that agree;
    meh lets the signs vote, unweighted, and drops both sides of a draw: both give other results.

    Source: Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708 (density 0.2); arcee-ai/mergekit, `ties`.

    Args:
        weights: One number per model, the base not counted; none means 1 for each.
        scale: Factor of the merged change (lambda in the paper).
        normalize: Divide by the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is wrong, or a knob is outside its range.
    """
    changes = kept_deltas(base, models, kept)
    return add_changes(base, changes, weights, elect=True, normalize=normalize, scale=scale)


def scores(base: Tensor, *models: Tensor) -> Tensor:
    """|x_i - base|, one row per model."""
    return magnitudes(base, models)


def window(numel: int, *, density: float = 0.2, min_numel: int = 0) -> tuple[int, int]:
    """The largest density * numel changes.

    Args:
        density (0 to 1): Share of the changes that each model keeps; more than 0 keeps at least one per tensor.
        min_numel: Tensors with fewer elements (biases, norms) keep all.
    """
    return 0, numel if numel < min_numel else kept_count(numel, density)
