"""Deltas, their election and their sum, which the sparse methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdops.core.noise import Noise
from sdops.errors import UsageError
from sdops.merges._knobs import per_model, share
from sdops.merges._masks import masked, zeros_of
from sdops.merges._rows import as_rows

PLACE = 0xFFFFFFFF  # the lower 32 bits of a sorting key


def deltas(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """x_i - base of N models, (N, ...)."""
    return torch.stack([model - base for model in models])


def magnitudes(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """|x_i - base| in float32, (N, ...): the scores that magnitude pruning ranks by."""
    return deltas(base, models).abs_().to(torch.float32)


def kept_count(numel: int, density: float) -> int:
    """How many of `numel` elements a density keeps: its integer part, at least one unless the density is 0."""
    return min(numel, max(1, int(share("density", density) * numel))) if density else 0


def add_changes(
    base: Tensor, changes: Tensor, weights: tuple[float, ...], *, elect: bool, normalize: bool, scale: float
) -> Tensor:
    """base + scale sum_i w_i d_i / divisor for sparse deltas d (N, ...).

    With `elect` an element's sign is that of sum_i w_i d_i (0 counts as +), and the d_i whose w_i d_i has the other
    sign, or is 0, take no part. The divisor is 1, or with `normalize` the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is not the number of models; all sum to zero and cannot be normalised.
    """
    scales = per_model(weights, len(changes))
    column = torch.tensor(scales, dtype=base.dtype, device=base.device).reshape(-1, *[1] * base.ndim)
    weighted = column * changes
    total = weighted.sum(0)
    if elect:
        direction = torch.ones_like(total).copysign_(total)
        agreeing = weighted.mul_(direction).clamp_(min=0)  # along the direction those that agree are positive
        total = agreeing.sum(0) * direction
        if normalize:
            divisor = agreeing.sign_().mul_(column).sum(0)
            total /= divisor + zeros_of(divisor)
    elif normalize:
        if abs(sum(scales)) < 1e-12:
            hint = "change a weight, or switch `normalize` off"
            raise UsageError(f"the weights {scales} sum to zero", hint=hint, weights=scales)
        total /= sum(scales)
    return base + scale * total


def drop_at_random(base: Tensor, models: Sequence[Tensor], noise: Noise, density: float) -> Tensor:
    """m_i (x_i - base) / density with m_i = 1 with probability `density`, else 0; (N, ...).

    Raises:
        UsageError: the density is outside [0, 1].
    """
    share("density", density)
    changes = deltas(base, models)
    if density == 0:
        return torch.zeros_like(changes)
    for index, change in enumerate(changes):
        change *= noise.uniform(index, like=change).lt_(density)
    return changes.div_(density)


def drop_small_rather(base: Tensor, models: Sequence[Tensor], noise: Noise, density: float, epsilon: float) -> Tensor:
    """m_i (x_i - base) / p_i with m_i = 1 with probability p_i = density - epsilon + 2 epsilon rank; (N, r, ...).

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
        change.copy_(masked(change / probability, keep))
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
