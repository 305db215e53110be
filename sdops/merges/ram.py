"""Keep what one model alone changed, average what several changed."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from sdops.core.elementwise import above, maximum
from sdops.merges._sparse import deltas

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "elementwise"


def ram(base: Tensor, *models: Tensor, epsilon: float = 1e-5) -> Tensor:
    """base + mean of the deltas x_i - base with |delta_i| > epsilon; base where there are none.

    Unlike in an average, a change that a single model made keeps its size.

    Source: Reinforced Agent Merging, https://arxiv.org/abs/2601.13572; arcee-ai/mergekit, `ram`.

    Args:
        epsilon (0 or more): Smaller changes do not count.
    """
    changes = deltas(base, models)
    changed = [above(abs(delta), epsilon) for delta in changes]  # 1 or 0
    total = reduce(add, [mask * delta for mask, delta in zip(changed, changes, strict=True)])
    return base + total / maximum(reduce(add, changed), 1)
