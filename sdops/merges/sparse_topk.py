"""Add only the largest changes of every model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._sparse import add_changes, kept_count, kept_deltas, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "ranked"


def sparse_topk(
    base: Tensor,
    *models: Tensor,
    kept: Tensor,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i d_i,   d_i = the largest of the deltas x_i - base, the others 0; not rescaled.

    `ties` without the election.

    Source: arcee-ai/mergekit, `sparsify.magnitude`.

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


def window(numel: int, *, density: float = 0.2, min_numel: int = 0) -> tuple[int, int]:
    """The largest density * numel changes.

    Args:
        density (0 to 1): Share of the changes that each model keeps; more than 0 keeps at least one per tensor.
        min_numel: Tensors with fewer elements (biases, norms) keep all.
    """
    return 0, numel if numel < min_numel else kept_count(numel, density)
