"""Keep the first model where two are similar, take the second where they differ (variant B)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdops.merges._similarity import AUTOENCODER, Read, blend, similarity_range

EXECUTION = "model"


def prepare(keys: Sequence[str], read: Read) -> tuple[float, float]:
    """Range of the similarities over the whole model, outliers left out."""
    return similarity_range(keys, read, normalize=False)


def cosine_b(a: Tensor, b: Tensor, *, state: tuple[float, float], key: str, alpha: float = 0.5) -> Tensor:
    """b + k (a - b),   k = clip((s - low) / (high - low) - alpha, 0, 1).

    s, per column (the cosine runs over dim 0), is the mean of the column's cosine and the cosine of the whole tensors,
    of a and b as they are (cosine_a scales the columns to length 1 first).
    low and high are the least and greatest s of the whole model after the lowest and highest 1 % are dropped. If all
    is equally similar, k = 1 - alpha. The autoencoder (`first_stage_model.`) stays a's.

    sd-mecha's `add_cosine_b` uses k = 1 - clip(s - alpha, 0, 1) for the share of b, of each tensor on its own; its
    results are not comparable with these.

    Source: hako-mikan/sd-webui-supermerger, "cosineB".

    Args:
        alpha: 0 keeps the most of a, 1 is b.
    """
    if key.startswith(AUTOENCODER):
        return a
    return blend(a, b, state, alpha=alpha, normalize=False)
