"""Learning rates over time: a factor between 0 and 1 for every step."""

from __future__ import annotations

from math import cos, pi


def factor(step: int, steps: int, schedule: str, *, warmup: int = 0, least: float = 0.0, cycles: int = 1) -> float:
    """The share of the learning rate that step `step` (from 0) has.

    Args:
        step: Of the optimizer.
        steps: Of the whole run.
        schedule: constant | linear | cosine | restarts (cosine, `cycles` times) | polynomial (squared).
        warmup: Steps in which it rises in a straight line; step `warmup` is the first at full rate.
        least: Share at the end.
        cycles: Of `restarts`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "linear":
        falling = 1 - done
    elif schedule == "cosine":
        falling = (1 + cos(pi * done)) / 2
    elif schedule == "restarts":
        falling = (1 + cos(pi * ((done * cycles) % 1.0))) / 2 if done < 1 else 0.0
    elif schedule == "polynomial":
        falling = (1 - done) ** 2
    else:
        falling = 1.0
    return least + (1 - least) * falling
