"""Deltas, their election and their sum, which the sparse methods share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdops.core.noise import Noise
from sdops.errors import UsageError
from sdops.merges._knobs import per_model, share
from sdops.merges._rows import as_rows


def deltas(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """x_i - base of N models, (N, ...)."""
    return torch.stack([model - base for model in models])


def magnitudes(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """|x_i - base| in float32, (N, ...): the scores that magnitude pruning ranks by."""
    return deltas(base, models).abs().to(torch.float32)


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
    if elect:
        positive = weighted.sum(0) >= 0
        agree = torch.where(positive, weighted > 0, weighted < 0)
        total = torch.where(agree, weighted, 0.0).sum(0)
        if normalize:
            divisor = (column * agree).sum(0)
            total = total / torch.where(divisor == 0, 1.0, divisor)
    else:
        total = weighted.sum(0)
        if normalize:
            if abs(sum(scales)) < 1e-12:
                hint = "change a weight, or switch `normalize` off"
                raise UsageError(f"the weights {scales} sum to zero", hint=hint, weights=scales)
            total = total / sum(scales)
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
        change *= noise.uniform(index, like=change) < density
    return changes / density


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
        probability = (density - epsilon + 2 * epsilon * _row_ranks(change.abs())).to(change.dtype)
        keep = noise.uniform(index, like=change) < probability
        change.copy_(torch.where(keep, change / probability, 0.0))
    return changes


def _row_ranks(sizes: Tensor) -> Tensor:
    """Rank within its row of every element, 0 smallest to 1 largest, float64; of equals the earlier ranks higher."""
    rows = as_rows(sizes)
    count = rows.shape[1]
    if count < 2:
        return torch.full(sizes.shape, 0.5, dtype=torch.float64, device=sizes.device)
    order = rows.argsort(dim=1, descending=True, stable=True)
    ranks = torch.linspace(1, 0, count, dtype=torch.float64, device=sizes.device).expand(rows.shape)
    return ranks.clone().scatter_(1, order, ranks).reshape(sizes.shape)
