"""Drop small changes rather than large ones and scale the others up to make good for it."""

from __future__ import annotations

from torch import Tensor

from sdops.core.noise import Noise
from sdops.merges._by_rank import drop_small_rather
from sdops.merges._sparse import add_changes

EXECUTION = "rows"


def della_linear(
    base: Tensor,
    *models: Tensor,
    noise: Noise,
    density: float = 0.5,
    epsilon: float = 0.15,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i m_i (x_i - base) / p_i; the expected result is `task_arithmetic`.

    m_i = 1 with probability p_i = density - epsilon + 2 epsilon r, where r is the rank of |x_i - base| in its row
    (index of dimension 0), from 0 for the smallest to 1 for the largest, 0.5 in a row of one element.

    Source: Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617; arcee-ai/mergekit, which scales by the ratio
    of the L1 norms in place of 1 / p.

    Args:
        density (0 to 1): Mean probability of keeping a change.
        epsilon (-0.5 to 0.5): A row's largest change is kept with density + epsilon, its smallest with density -
            epsilon.
        weights: One number per model, the base not counted; none means 1 for each.
        scale: Factor of the merged change (lambda in the paper).
        normalize: Divide by the sum of the weights that take part.

    Raises:
        UsageError: density - epsilon is not above 0 or density + epsilon above 1; the number of weights is wrong.
    """
    changes = drop_small_rather(base, models, noise, density, epsilon)
    return add_changes(base, changes, weights, elect=False, normalize=normalize, scale=scale)
