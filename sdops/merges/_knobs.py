"""Checks of knobs that several methods share."""

from __future__ import annotations

from sdops.errors import UsageError


def per_model(weights: tuple[float, ...], count: int) -> tuple[float, ...]:
    """One weight for each of `count` models; no weights given means 1 for each.

    Raises:
        UsageError: the number of weights is not the number of models.
    """
    if weights and len(weights) != count:
        raise UsageError(
            f"`weights` has {len(weights)} numbers for {count} models",
            hint="give one weight per model in the order of the files; the base has none",
            weights=weights,
            models=count,
        )
    return weights or (1.0,) * count


def share(name: str, value: float) -> float:
    """A knob that makes sense between 0 and 1 only.

    Raises:
        UsageError: it is outside, or NaN.
    """
    if not 0 <= value <= 1:
        raise UsageError(f"`{name}` is {value:g}", hint=f"choose `{name}` between 0 and 1", knob=name, value=value)
    return value
