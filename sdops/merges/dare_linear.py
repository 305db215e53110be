"""Drop changes at random and scale the others up to make good for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.merges._sparse import add_changes, drop_at_random

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.core.noise import Noise

EXECUTION = "elementwise"


def dare_linear(
    base: Tensor,
    *models: Tensor,
    noise: Noise,
    density: float = 0.5,
    weights: tuple[float, ...] = (),
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale sum_i w_i m_i (x_i - base) / density,   m_i = 1 with probability `density`, else 0.

    The expected result is `task_arithmetic`. Every element of every model is drawn by itself. mergekit scales by
    the ratio of the L1 norms in place of 1 / density; the "supermario" scripts divide by the drop rate, which is wrong.

    Source: Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099

    Args:
        density (0 to 1): Probability of keeping a change; 0 gives the base. The paper drops up to 0.99.
        weights: One number per model, the base not counted; none means 1 for each.
        scale: Factor of the merged change (lambda in the paper).
        normalize: Divide by the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is wrong, or a knob is outside its range.
    """
    changes = drop_at_random(base, models, noise, density)
    return add_changes(base, changes, weights, elect=False, normalize=normalize, scale=scale)
