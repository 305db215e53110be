"""Drop changes at random, scale the others up, and add those that agree in sign."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._sparse import add_changes, drop_at_random

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.core.noise import Noise

EXECUTION = "elementwise"


def dare_ties(
    base: Tensor,
    *models: Tensor,
    noise: Noise,
    density: float = 0.5,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i d_i a_i,   d_i = m_i (x_i - base) / density,   m_i = 1 with probability `density`.

    a_i is 1 where w_i d_i has the sign of sum_j w_j d_j (0 counts as +), else 0: `dare_linear`, then `ties`' election.

    Source: https://arxiv.org/abs/2311.03099 and https://arxiv.org/abs/2306.01708; arcee-ai/mergekit, `dare_ties`.

    Args:
        density (0 to 1): Probability of keeping a change; 0 gives the base. The paper drops up to 0.99.
        weights: One number per model, the base not counted; none means 1 for each.
        scale: Factor of the merged change (lambda in the paper).
        normalize: Divide by the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is wrong, or a knob is outside its range.
    """
    changes = drop_at_random(base, models, noise, density)
    return add_changes(base, changes, weights, elect=True, normalize=normalize, scale=scale)
