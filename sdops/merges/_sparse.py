"""Changes from a base, their election and their sum, which the sparse methods share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from sdops.core.elementwise import above, masked, maximum, sign_of, zeros_of
from sdops.errors import UsageError
from sdops.merges._knobs import per_model, share

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.core.noise import Noise


def deltas(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """x_i - base of every model."""
    return [model - base for model in models]


def kept_deltas(base: Tensor, models: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
    """x_i - base where the masks (N, ...) are true, else 0."""
    return [masked(delta, mask) for delta, mask in zip(deltas(base, models), kept, strict=True)]


def magnitudes(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """|x_i - base| in float32, (N, ...): the scores that magnitude pruning ranks by."""
    import torch

    return torch.stack(deltas(base, models)).abs_().to(torch.float32)


def kept_count(numel: int, density: float) -> int:
    """How many of `numel` elements a density keeps: its integer part, at least one unless the density is 0."""
    return min(numel, max(1, int(share("density", density) * numel))) if density else 0


def add_changes(
    base: Tensor, changes: Sequence[Tensor], weights: tuple[float, ...], *, elect: bool, normalize: bool, scale: float
) -> Tensor:
    """base + scale sum_i w_i d_i / divisor for sparse deltas d_i.

    With `elect` an element's sign is that of sum_i w_i d_i (0 counts as +), and the d_i whose w_i d_i has the other
    sign, or is 0, take no part. The divisor is 1, or with `normalize` the sum of the weights that take part.

    Raises:
        UsageError: the number of weights is not the number of models; all sum to zero and cannot be normalised.
    """
    scales = per_model(weights, len(changes))
    weighted = [weight * change for weight, change in zip(scales, changes, strict=True)]
    total = reduce(add, weighted)
    if elect:
        direction = sign_of(total)
        agreeing = [maximum(change * direction, 0) for change in weighted]  # along the direction those are positive
        total = reduce(add, agreeing) * direction
        if normalize:
            divisor = reduce(add, [weight * above(x, 0) for weight, x in zip(scales, agreeing, strict=True)])
            total = total / (divisor + zeros_of(divisor))
    elif normalize:
        if abs(sum(scales)) < 1e-12:
            hint = "change a weight, or switch `normalize` off"
            raise UsageError(f"the weights {scales} sum to zero", hint=hint, weights=scales)
        total = total / sum(scales)
    return base + scale * total


def drop_at_random(base: Tensor, models: Sequence[Tensor], noise: Noise, density: float) -> list[Tensor]:
    """m_i (x_i - base) / density with m_i = 1 with probability `density`, else 0.

    Raises:
        UsageError: the density is outside [0, 1].
    """
    share("density", density)
    kept = [
        masked(change, noise.uniform(index, like=change) < density) for index, change in enumerate(deltas(base, models))
    ]
    return [change / (density or 1) for change in kept]  # with density 0 none is kept
