"""Random choice of changes by their rank in their row, for the DELLA methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdops.core.elementwise import masked
from sdops.core.noise import Noise
from sdops.errors import UsageError
from sdops.merges._rows import as_rows
from sdops.merges._sparse import deltas

PLACE = 0xFFFFFFFF  # the lower 32 bits of a sorting key


def drop_small_rather(
    base: Tensor, models: Sequence[Tensor], noise: Noise, density: float, epsilon: float
) -> list[Tensor]:
    """m_i (x_i - base) / p_i with m_i = 1 with probability p_i = density - epsilon + 2 epsilon rank.

    Raises:
        UsageError: p_i would not be a probability above 0.
    """
    if not (density - abs(epsilon) > 0 and density + abs(epsilon) <= 1):
        raise UsageError(
            f"with density {density:g} and epsilon {epsilon:g} changes would be kept with probability "
            f"{density - epsilon:g} to {density + epsilon:g}",
            hint="choose them so that density - epsilon is above 0 and density + epsilon at most 1",
            density=density,
            epsilon=epsilon,
        )
    changes = deltas(base, models)
    for index, change in enumerate(changes):
        probability = _by_rank(change.abs(), density - epsilon, 2 * epsilon)
        keep = noise.uniform(index, like=change) < probability
        changes[index] = masked(change / probability, keep)
    return changes


def _by_rank(sizes: Tensor, lowest: float, span: float) -> Tensor:
    """lowest + span r for every element's rank r in its row of sizes (r, ...), 0 smallest to 1 largest.

    Sizes rank as float32; of equals the earlier ranks higher. The only element of a row has the rank 0.5.
    """
    rows = as_rows(sizes)
    count = rows.shape[1]
    ranks = torch.linspace(1, 0, count, dtype=torch.float64) if count > 1 else torch.tensor([0.5]).double()
    descending = (lowest + span * ranks[:count]).to(sizes.dtype)
    # Sorting negated bit patterns, with the places in the row below them, is many times faster than a stable argsort.
    bits = rows.to("cpu", torch.float32).view(torch.int32)
    keys = (-bits).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(torch.arange(count))
    keys.numpy().sort(axis=1)
    result = torch.empty(rows.shape, dtype=sizes.dtype)
    result.scatter_(1, keys.bitwise_and_(PLACE), descending.expand(rows.shape))
    return result.reshape(sizes.shape).to(sizes.device)
